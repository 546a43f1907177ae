// SPDX-License-Identifier: MIT
/*
 * The inline driver: UFFD_FEATURE_SIGBUS turns a fault into a SIGBUS in the faulting
 * thread, and the code below resolves it there, in the signal handler
 * (access/sigbus.c).  There is no hand-over, and locks held by the thread do not matter:
 * this code takes none and allocates nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "grown.h"
#include "inline.h"
#include "pause.h"
#include "range.h"
#include "resolve.h"
#include "stats.h"
#include "access/sigbus.h"
#include "base/clock.h"

/* Bits of the page-fault error code, as the CPU pushed it (REG_ERR). */
#define FAULT_PRESENT		(1u << 0)
#define FAULT_WRITE		(1u << 1)

/*
 * If the same thread faults this often on one address with the page present each time,
 * we cannot resolve that SIGBUS.
 */
#define REPEAT_LIMIT		1000

struct uffd_table uffd_inline_table = UFFD_TABLE_INIT;

static _Atomic uint32_t taken_out;	/* how often a range, or a part of one, was */

/* initial-exec: accessed without a call that could allocate. */
static __thread struct {
	uint64_t address;
	unsigned int count;
	unsigned int closed;		/* accesses to a range that was not open, in a row */
	uint32_t taken_out;		/* of the global count, what this thread knows */
} repeated __attribute__((tls_model("initial-exec")));

/* Count a fault that was not resolved; false if there were too many on this address. */
static bool may_repeat(uint64_t address)
{
	if (repeated.address != address)
		repeated.count = 0;
	repeated.address = address;
	return ++repeated.count < REPEAT_LIMIT;
}

/* The signal does not tell the kind of fault: guess it from the error code and the range. */
static enum uffd_fault_kind first_guess(const struct uffd_range *range, uint64_t error)
{
	bool write = error & FAULT_WRITE;

	if ((error & FAULT_PRESENT) && write && (range->mode & UFFDIO_REGISTER_MODE_WP))
		return UFFD_KIND_WP;
	/* COPY fails with EEXIST if only the page cache has the page; not in private mappings. */
	if (range->mode & UFFDIO_REGISTER_MODE_MINOR &&
	    (range->content->writes_cache || !range->content->shared ||
	     !(range->mode & UFFDIO_REGISTER_MODE_MISSING)))
		return UFFD_KIND_MINOR;
	if (range->mode & UFFDIO_REGISTER_MODE_MISSING)
		return UFFD_KIND_MISSING;
	return UFFD_KIND_WP;
}

/*
 * The guess was wrong: the page was present, or is not in the page cache.  Try each kind
 * once.  A private page that was swapped out is present, but not in the cache.
 */
static bool next_guess(const struct uffd_range *range, uint64_t error, unsigned int *tried,
		       enum uffd_fault_kind *kind)
{
	const struct {
		enum uffd_fault_kind kind;
		bool possible;
	} guesses[] = {
		{ UFFD_KIND_MISSING, range->mode & UFFDIO_REGISTER_MODE_MISSING },
		{ UFFD_KIND_MINOR, range->mode & UFFDIO_REGISTER_MODE_MINOR },
		{ UFFD_KIND_WP, range->mode & UFFDIO_REGISTER_MODE_WP && error & FAULT_WRITE },
	};

	*tried |= 1u << *kind;
	for (size_t i = 0; i < sizeof(guesses) / sizeof(guesses[0]); i++) {
		if (!guesses[i].possible || *tried & 1u << guesses[i].kind)
			continue;
		*kind = guesses[i].kind;
		return true;
	}
	return false;
}

/* Fill the rest of the chunk now: there is no other thread to do it. */
static void prefetch_now(struct uffd_range *range, struct uffd_hold *hold, uint64_t page)
{
	struct uffd_engine *engine = range->space->engine;
	struct fill_run run = { 0 };
	uint64_t end;

	prefetch_span(range, page, &run.past, &end);
	if (hold)
		uffd_hold_move(hold, run.past, end);
	while (run.past < end && !run.error) {
		run = fill_absent(range, run.past, end, FILL_AHEAD);
		count(engine, COUNTER(prefetched_pages), run.filled >> range->page_shift);
	}
}

/* Returns false if the SIGBUS is not ours after all. */
static bool resolve_inline(struct uffd_range *range, struct uffd_hold *hold, uint64_t address,
			   uint64_t error, uint32_t thread_id)
{
	static const uint64_t flags_of[] = {
		[UFFD_KIND_MISSING] = 0,
		[UFFD_KIND_WP] = UFFD_PAGEFAULT_FLAG_WP,
		[UFFD_KIND_MINOR] = UFFD_PAGEFAULT_FLAG_MINOR,
	};
	struct uffd_engine *engine = range->space->engine;
	uint64_t page = page_of(range, address);
	enum uffd_fault_kind kind = first_guess(range, error);
	uint64_t began = uffd_now_ns();
	unsigned int attempt = 0, tried = 0;
	enum outcome outcome;

	for (;;) {
		outcome = resolve_page(range, page, kind, NULL);
		if ((outcome == OUTCOME_PRESENT ||
		     (outcome == OUTCOME_GONE && kind == UFFD_KIND_MINOR)) &&
		    next_guess(range, error, &tried, &kind))
			continue;
		if (outcome == OUTCOME_IN_FLIGHT) {
			uffd_back_off(attempt++);
			/* The previous holder may have resolved it; look again. */
			kind = first_guess(range, error);
			tried = 0;
			continue;
		}
		/* Always present, and yet it faults: no huge page is free for it. */
		if (outcome == OUTCOME_PRESENT && is_huge(range) && kind != UFFD_KIND_MINOR &&
		    repeated.address == address && repeated.count >= EXISTS_LIMIT)
			outcome = OUTCOME_DEFER;
		if (outcome != OUTCOME_DEFER)
			break;
		count(engine, COUNTER(deferred), 1);
		if (uffd_now_ns() - began > engine->options.retry_limit_ns) {
			outcome = apply_on_error(range, page, -EAGAIN, UFFD_FAILED_RESOLVE, 0);
			break;
		}
		uffd_back_off(attempt++);
		count(engine, COUNTER(retried), 1);
	}
	/* No content: pass on the SIGBUS, also if the kernel reports poison as BUS_ADRERR. */
	if (outcome == OUTCOME_POISONED)
		return false;
	if (outcome == OUTCOME_RESOLVED) {
		if (engine->options.prefetch && kind != UFFD_KIND_WP)
			prefetch_now(range, hold, page);
		note_fault(engine, range->space->number, address,
			   flags_of[kind] | (error & FAULT_WRITE ? UFFD_PAGEFAULT_FLAG_WRITE : 0),
			   thread_id, began);
		repeated.count = 0;
		return true;
	}
	return may_repeat(address);
}

/*
 * The caller is a reader of the table, and no longer one when this returns.  The fault is
 * not resolved while the engine is paused: `paused_ret`.
 */
static bool resolve_outside(struct uffd_range *range, unsigned int shard, uint64_t address,
			    uint64_t error, bool *paused_ret)
{
	uint64_t page = page_of(range, address);
	uint32_t thread_id = (uint32_t)syscall(SYS_gettid);
	struct uffd_hold *hold = leave_with(&uffd_inline_table, shard, range, page,
					    page + range->page_size, thread_id);
	bool ours = true;

	*paused_ret = is_paused(range->space->engine);
	if (!*paused_ret)
		ours = resolve_inline(range, hold, address, error, thread_id);
	let_go(&uffd_inline_table, shard, hold);
	return ours;
}

/* For a page that a mapping has grown by: try each possible kind of fault once. */
static bool resolve_grown_inline(uint64_t address, uint64_t error)
{
	bool is_protected = error & FAULT_PRESENT && error & FAULT_WRITE;
	enum uffd_fault_kind kind = is_protected ? UFFD_KIND_WP : UFFD_KIND_MISSING;
	enum outcome outcome = resolve_grown(&uffd_inline_table, address, kind);

	/* Present, or only the page cache holds it. */
	if (outcome == OUTCOME_PRESENT && kind == UFFD_KIND_MISSING) {
		outcome = resolve_grown(&uffd_inline_table, address, UFFD_KIND_MINOR);
		if (outcome == OUTCOME_STRAY)
			outcome = OUTCOME_PRESENT;
	}
	if (outcome == OUTCOME_DEFER)
		uffd_back_off(repeated.address == address ? repeated.count : 0);
	return outcome != OUTCOME_STRAY && may_repeat(address);
}

/*
 * The range may have been taken out since the fault: each thread tries its access again once
 * for each time that this has happened.
 */
static bool was_taken_out(void)
{
	uint32_t now = atomic_load(&taken_out);
	bool is_new = now != repeated.taken_out;

	repeated.taken_out = now;
	return is_new;
}

static bool resolve_sigbus(uint64_t address, uint64_t error)
{
	unsigned int shard, attempt = 0;
	struct uffd_range *range;
	bool ours, paused;

	do {
		shard = uffd_table_enter(&uffd_inline_table, current_cpu());
		range = uffd_table_find(&uffd_inline_table, address);
		if (!range) {
			ours = resolve_grown_inline(address, error);
			uffd_table_leave(&uffd_inline_table, shard);
			return ours || was_taken_out();
		}
		/* Try the access again: it is opened, or unregistered without being served. */
		if (!is_open(range)) {
			uffd_table_leave(&uffd_inline_table, shard);
			uffd_back_off(repeated.closed++);
			return true;
		}
		repeated.closed = 0;
		ours = resolve_outside(range, shard, address, error, &paused);
		if (paused)
			uffd_back_off(attempt++);
	} while (paused);
	return ours;
}

void inline_note_taken_out(void)
{
	atomic_fetch_add(&taken_out, 1);
}

/*
 * A fork's child has the action and the table, but the ranges are its parent's, and a
 * thread that does not exist here may have been inside.  Start again as if no handler
 * had existed.
 */
void inline_forget_parent(void)
{
	uffd_sigbus_forget_parent();
	uffd_table_init(&uffd_inline_table);
}

int uffd_inline_start(struct uffd_engine *engine)
{
	int r;

	/* An earlier call may have succeeded before an exception hid that from the caller. */
	if (engine->inline_started)
		return 0;
	r = uffd_sigbus_acquire(resolve_sigbus);
	engine->inline_started = r == 0;
	return r;
}

void uffd_inline_stop(struct uffd_engine *engine, uint32_t to_original)
{
	if (!engine->inline_started)
		return;
	engine->inline_started = false;
	uffd_sigbus_release(to_original);
}

int uffd_inline_serves(uint64_t address)
{
	unsigned int shard = uffd_table_enter(&uffd_inline_table, current_cpu());
	struct uffd_range *range = uffd_table_find(&uffd_inline_table, address);
	bool serves = range && range->space->engine->inline_started;

	uffd_table_leave(&uffd_inline_table, shard);
	return serves;
}

int uffd_inline_is_installed(void)
{
	return uffd_sigbus_is_installed();
}

int uffd_inline_reinstall(void)
{
	return uffd_sigbus_reinstall();
}
