// SPDX-License-Identifier: MIT
/*
 * Strays: faults in registered memory that is not served, or whose range is not open yet.
 *
 * The memory may be served next: it was registered first, or the handler was created
 * before it had anything to serve.  Serving a range wakes the threads that wait in it,
 * so that the kernel sends their faults again.  Remember strays, because their threads
 * would wait forever if that never happens: refuse a stray after the time that a
 * deferred fault gets.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "failures.h"
#include "fill.h"
#include "grown.h"
#include "pending.h"
#include "range.h"
#include "say.h"
#include "space.h"
#include "stats.h"
#include "stray.h"
#include "vacated.h"
#include "base/clock.h"

static enum outcome refuse_unserved(struct uffd_space *space, uint64_t address, bool last_try)
{
	static const uint64_t sizes[] = { BASE_PAGE, 2u << 20, 1u << 30 };
	struct uffd_engine *engine = space->engine;
	struct uffd_fill_result result = { 0 };
	struct uffd_fill fill = {
		.fd = space->fd,
		.op = UFFD_FILL_POISON,
		.mode = UFFDIO_POISON_MODE_DONTWAKE,
	};
	int r = -EINVAL;

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]) && r == -EINVAL; i++) {
		fill.dst = address & ~(sizes[i] - 1);
		fill.length = fill.page_size = sizes[i];
		r = uffd_fill_run(&fill, &result);
	}
	if (r == 0 && result.deferred && !last_try)
		return OUTCOME_DEFER;
	if (r == -ENOENT || r == -ESRCH || result.already_present) {
		/* Unregistered or filled since the fault was sent: its threads are awake. */
		count(engine, COUNTER(layout_changed), 1);
		return OUTCOME_GONE;
	}
	if (r == 0)
		r = result.deferred ? -EAGAIN : -EFAULT;
	count(engine, COUNTER(unserved), 1);
	note_failure(engine, address, 0, r, UFFD_FAILED_UNSERVED);
	say_engine_fails(engine, address, r, UFFD_FAILED_UNSERVED,
			 r == -EFAULT ? "it is poisoned: threads that touch it get SIGBUS"
				      : "threads that touch it wait");
	if (r == -EFAULT)
		uffd_shim_wake(space->fd, fill.dst, fill.length);
	return OUTCOME_FAILED;
}

/*
 * While the layout changes, a range may have been moved here with its event still to
 * come: then the fault must be retried.
 */
enum outcome note_stray(const struct deferred_fault *fault, bool last_try)
{
	struct uffd_space *space = fault->space;
	struct uffd_engine *engine = space->engine;
	/* Perhaps left behind by a move, or served since the caller looked. */
	bool is_unknown = is_vacated(space, fault->address) ||
			  uffd_table_find(space->table, fault->address);
	enum outcome outcome = OUTCOME_STRAY;

	if (is_unknown && !last_try)
		return OUTCOME_DEFER;
	if (!is_unknown)
		outcome = resolve_grown(space->table, fault->address, fault_kind(fault->flags));
	if (outcome != OUTCOME_STRAY && !(outcome == OUTCOME_DEFER && last_try))
		return outcome;
	if (last_try || atomic_load(&engine->refusing))
		return refuse_unserved(space, fault->address, last_try);
	if (layout_is_changing(space))
		return OUTCOME_DEFER;
	remember_fault(&engine->strays, fault);
	return OUTCOME_STRAY;
}

static bool is_served(const struct deferred_fault *fault)
{
	struct uffd_table *table = fault->space->table;
	unsigned int shard = uffd_table_enter(table, current_cpu());
	struct uffd_range *range = uffd_table_find(table, fault->address);
	bool served = range && is_open(range);

	uffd_table_leave(table, shard);
	return served;
}

void uffd_engine_leave_strays(struct uffd_engine *engine)
{
	engine->leaves_strays = true;
}

static void send_again(const struct deferred_fault *fault)
{
	uffd_shim_wake(fault->space->fd, fault->address & ~(BASE_PAGE - 1ull), BASE_PAGE);
}

uint64_t refuse_strays(struct uffd_engine *engine, bool all)
{
	struct fault_list *list = &engine->strays;
	uint64_t now, next = UINT64_MAX;
	size_t kept = 0;
	uint32_t phase;

	if (!list->count)
		return next;
	now = uffd_now_ns();
	phase = begin_work(engine);
	for (size_t i = 0; i < list->count; i++) {
		struct deferred_fault fault = list->faults[i];
		uint64_t due = higher(fault.since_ns, atomic_load(&engine->pause.ended_ns)) +
			       engine->options.retry_limit_ns;

		if (is_served(&fault))
			continue;
		if (all && engine->leaves_strays)
			send_again(&fault);
		else if (!all && now < due && !atomic_load(&engine->refusing)) {
			list->faults[kept++] = fault;
			if (due < next)
				next = due;
		} else if (refuse_unserved(fault.space, fault.address, all) == OUTCOME_DEFER) {
			defer_fault(engine, &fault);
		}
	}
	list->count = kept;
	end_work(engine, phase);
	return next;
}
