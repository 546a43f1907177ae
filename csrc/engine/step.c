// SPDX-License-Identifier: MIT
/* One step of the leader: read, apply, resolve. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/epoll.h>

#include "barrier.h"
#include "crowd.h"
#include "failures.h"
#include "gate.h"
#include "layout.h"
#include "pause.h"
#include "pending.h"
#include "prefetch.h"
#include "range.h"
#include "resolve.h"
#include "say.h"
#include "stall.h"
#include "stats.h"
#include "step.h"
#include "stray.h"
#include "base/clock.h"
#include "base/poll.h"

/*
 * The interval of retries of a read that failed for lack of a descriptor.  Faults are still
 * read in the meantime, as reads return them before events, after at most this delay.
 */
#define PUT_OFF_MS		10

/* Reading may fail for lack of descriptors or memory; the message stays queued. */
static bool is_passing(int error)
{
	return error == -EMFILE || error == -ENFILE || error == -ENOMEM;
}

/* At the end all pages get saved: do not save single pages for faults. */
static bool is_left_to_the_end(const struct uffd_range *range, enum uffd_fault_kind kind)
{
	return kind == UFFD_KIND_WP && range->content->preserve && ends(range->space->engine);
}

/*
 * The page's old content is saved, or need not be, and only lifting the protection has to
 * be retried: no source can mend that, poison would lose what the page holds, and nothing
 * else would wake the writer.
 */
static bool lacks_nothing(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind)
{
	return kind == UFFD_KIND_WP &&
	       !(preserves(range) && atomic_load(state_of(range, page)) == UFFD_PAGE_CLEAN);
}

/* Returns OUTCOME_DEFER if the fault must be retried later. */
static enum outcome handle_fault(struct uffd_engine *engine, const struct deferred_fault *fault,
			 bool last_try)
{
	struct uffd_table *table = fault->space->table;
	unsigned int shard = uffd_table_enter(table, current_cpu());
	struct uffd_range *range = uffd_table_find(table, fault->address);
	enum uffd_fault_kind kind = fault_kind(fault->flags);
	struct uffd_hold *hold = NULL;
	enum outcome outcome;
	bool in_line;
	uint64_t page;

	if (range && !is_open(range))
		range = NULL;
	if (range && is_left_to_the_end(range, kind)) {
		outcome = OUTCOME_IN_FLIGHT;
	} else if (range) {
		page = page_of(range, fault->address);
		hold = leave_with(table, shard, range, page, page + range->page_size,
				  engine->leader_id);
		if (engine->options.has_workers && fault->thread_id && kind != UFFD_KIND_WP)
			end_own_wait(range, page, fault->thread_id);
		in_line = is_next_in_line(range, page, kind);
		if (fault->late && (in_line || fault->late->space != fault->space ||
				    may_block(range, page, kind)))
			wake_late(fault->late);
		/* The reader that the newest job was for has gone elsewhere. */
		if (engine->job_count && !in_line)
			engine->jobs[engine->job_count - 1].for_reader = false;
		outcome = in_line ? fill_in_line(range, page, kind, fault)
				  : resolve_as_leader(range, page, kind, fault);
		if (outcome == OUTCOME_DISMISSED) {
			/* Its own page may be in place too.  The hold keeps the space. */
			if (fault->late) {
				wake_later(fault->late, range->space, page, range->page_size);
				wake_late(fault->late);
			}
			let_go(table, shard, hold);
			return outcome;
		}
		if (fault->late && (outcome == OUTCOME_RESOLVED || outcome == OUTCOME_PRESENT))
			wake_later(fault->late, range->space, page, range->page_size);
		if (outcome == OUTCOME_RESOLVED && !in_line)
			plan_prefetch(range, page, kind);
		/*
		 * The thread at this page wakes the waiters of its own space; a fault
		 * of a fork that shares the page must be retried.
		 */
		if (outcome == OUTCOME_IN_FLIGHT && range->content->shared &&
		    (atomic_load(&engine->space_count) > 1 || range->space->has_left))
			outcome = OUTCOME_DEFER;
		else if (outcome == OUTCOME_DEFER && last_try && !lacks_nothing(range, page, kind))
			outcome = apply_on_error(range, page, -EAGAIN, UFFD_FAILED_RESOLVE,
						 fault->thread_id);
	} else {
		outcome = note_stray(fault, last_try);
	}
	let_go(table, shard, hold);
	uffd_barrier(UFFD_BARRIER_FAULT_WOKEN);
	if (outcome == OUTCOME_RESOLVED)
		note_fault(engine, fault->space->number, fault->address, fault->flags,
			   fault->thread_id, fault->since_ns);
	return outcome;
}

void retry_deferred(struct uffd_engine *engine)
{
	uint64_t now = uffd_now_ns();
	struct fault_list *list = &engine->deferred;
	size_t total = list->count, kept = 0;
	uint32_t phase = begin_work(engine);
	enum outcome outcome = OUTCOME_RESOLVED;
	struct late_wakes late = late_wakes_for(total);

	if (total >= CROWD)
		sort_faults(list->faults, total);
	for (size_t i = 0; i < total; i++) {
		struct deferred_fault fault = list->faults[i];
		bool last_try, waits = is_paused(engine);

		/* The layout changes until the event is read: do not count that time. */
		if (fault.space->is_put_off || waits)
			fault.since_ns = now;
		if (waits) {
			list->faults[kept++] = fault;
			continue;
		}
		last_try = now > higher(fault.since_ns, atomic_load(&engine->pause.ended_ns)) +
				 engine->options.retry_limit_ns;
		count(engine, COUNTER(retried), 1);
		fault.late = total < CROWD ? NULL : &late;
		outcome = handle_fault(engine, &fault, last_try);
		if (outcome == OUTCOME_DISMISSED)
			break;
		fault.late = NULL;
		if (outcome == OUTCOME_DEFER)
			list->faults[kept++] = fault;
	}
	if (outcome != OUTCOME_DISMISSED) {
		wake_late(&late);
		list->count = kept;
	}
	end_work(engine, phase);
}

/* Read into the log, and apply its layout events; returns the number of messages, or -errno. */
static int64_t drain_and_apply(struct uffd_space *space)
{
	struct message_log *log = &space->engine->shared->log;
	int64_t queued;

	if (!gate_close(space))
		return 0;
	atomic_store_explicit(&log->space, space->number, memory_order_relaxed);
	atomic_fetch_add_explicit(&log->sequence, LOG_MESSAGES, memory_order_release);
	/* One read returns everything that is queued. */
	queued = uffd_shim_read(space->fd, log->messages, sizeof(log->messages));
	if (queued == -EAGAIN)
		queued = 0;
	if (queued > 0) {
		queued /= (int64_t)sizeof(*log->messages);
		uffd_barrier(UFFD_BARRIER_STEP_READ);
		/* Layout events first: a fault may be read before an event that precedes it. */
		apply_log(space, (size_t)queued);
	}
	gate_leave(space);
	return queued;
}

/* Wait a little, or until the leader is woken. */
static void put_off(struct uffd_space *space, int error)
{
	struct uffd_engine *engine = space->engine;
	struct pollfd wake = { .fd = engine->wake_fd, .events = POLLIN };

	if (!space->is_put_off) {
		count(engine, COUNTER(deferred), 1);
		say_read_is_put_off(space, error);
	}
	space->is_put_off = true;
	uffd_poll(&wake, 1, PUT_OFF_MS);
}

static void note_read(struct uffd_space *space)
{
	if (space->is_put_off)
		atomic_store(&space->engine->said[UFFD_FAILED_READ], false);
	space->is_put_off = false;
}

static struct deferred_fault fault_of(struct uffd_space *space, const struct uffd_msg *message,
				      uint64_t now)
{
	return (struct deferred_fault){
		.space = space,
		.address = message->arg.pagefault.address,
		.flags = message->arg.pagefault.flags,
		.since_ns = now,
		.read_ns = now,
		.thread_id = message->arg.pagefault.ptid,
	};
}

/* Bring the faults of many messages in order; false: they are few, or there is no memory. */
static bool gather_crowd(struct uffd_space *space, size_t queued, uint64_t now)
{
	struct fault_list *crowd = &space->engine->crowd;

	crowd->count = 0;
	if (queued < CROWD || !fault_list_grow(crowd, queued))
		return false;
	for (size_t i = 0; i < queued; i++) {
		const struct uffd_msg *message = &space->engine->shared->log.messages[i];

		if (message->event == UFFD_EVENT_PAGEFAULT)
			crowd->faults[crowd->count++] = fault_of(space, message, now);
	}
	sort_faults(crowd->faults, crowd->count);
	return true;
}

/* Returns false if the leader was dismissed. */
static bool handle_faults(struct uffd_space *space, size_t queued)
{
	struct uffd_engine *engine = space->engine;
	uint64_t now = uffd_now_ns();
	bool is_crowd = gather_crowd(space, queued, now);
	size_t total = is_crowd ? engine->crowd.count : queued;
	struct late_wakes late = late_wakes_for(total);

	for (size_t i = 0; i < total; i++) {
		const struct uffd_msg *message = &engine->shared->log.messages[i];
		struct deferred_fault fault;
		enum outcome outcome;

		if (!is_crowd && message->event != UFFD_EVENT_PAGEFAULT)
			continue;
		fault = is_crowd ? engine->crowd.faults[i] : fault_of(space, message, now);
		fault.late = is_crowd ? &late : NULL;
		if (is_paused(engine)) {
			defer_fault(engine, &fault);
			continue;
		}
		outcome = handle_fault(engine, &fault, false);
		if (outcome == OUTCOME_DISMISSED)
			return false;
		if (outcome == OUTCOME_DEFER) {
			count(engine, COUNTER(deferred), 1);
			defer_fault(engine, &fault);
		}
	}
	wake_late(&late);
	return true;
}

/* Returns false if the leader was dismissed. */
static bool step_space(struct uffd_space *space, uint32_t *handled)
{
	struct uffd_engine *engine = space->engine;
	int64_t queued = drain_and_apply(space);

	if (is_passing((int)queued)) {
		put_off(space, (int)queued);
		return true;
	}
	note_read(space);
	if (queued < 0) {
		note_failure(engine, 0, 0, (int)queued, UFFD_FAILED_READ);
		say_engine_fails(engine, 0, (int)queued, UFFD_FAILED_READ,
				 "its faults are no longer resolved");
		atomic_store(&space->gone, true);
		atomic_fetch_add(&engine->doomed_spaces, 1);
	}
	if (queued <= 0)
		return true;
	uffd_barrier(UFFD_BARRIER_STEP_APPLIED);
	if (!handle_faults(space, (size_t)queued))
		return false;
	count(engine, COUNTER(messages), (uint64_t)queued);
	*handled += (uint32_t)queued;
	return true;
}

static void step_ready_spaces(struct uffd_engine *engine, uint32_t *handled)
{
	struct epoll_event ready[SPACES_AT_ONCE];
	int n = epoll_wait(engine->epoll_fd, ready, SPACES_AT_ONCE, 0);

	for (int i = 0; i < n; i++)
		if (ready[i].data.ptr != &engine->wake_fd &&
		    ready[i].data.ptr != &engine->owner_pidfd &&
		    !step_space(ready[i].data.ptr, handled))
			return;
}

void uffd_engine_step(struct uffd_engine *engine, uint32_t *handled_ret)
{
	/* Reading an event lets its thread continue, so this counts as work as well. */
	uint32_t phase = begin_work(engine);

	engine->steps++;
	*handled_ret = 0;
	if (atomic_load(&engine->space_count) > 1)
		step_ready_spaces(engine, handled_ret);
	else if (!atomic_load(&engine->primary->gone))
		step_space(engine->primary, handled_ret);
	end_work(engine, phase);
}
