// SPDX-License-Identifier: MIT
/* The step of whoever leads: read, apply, resolve, and fill ahead. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>

#include "alloc.h"
#include "core.h"

/*
 * For a reader in sequence, who waits for all of it anyway: the end of each ioctl
 * wakes it, and it is soon back, having caught up with the next.  With 512 KiB that
 * costs a tenth of the throughput where both are on CPUs of their own (measured).
 */
#define SEQUENTIAL_SLICE	(8u << 20)

/* Prefetching, for the leader */

static void push_job(struct uffd_range *range, uint64_t at, uint64_t end, bool for_reader)
{
	struct uffd_engine *engine = range->space->engine;

	if (at >= end)
		return;
	if (engine->job_count == PREFETCH_JOBS) {
		/* The oldest guess is the worst one. */
		memmove(&engine->jobs[0], &engine->jobs[1],
			(PREFETCH_JOBS - 1) * sizeof(engine->jobs[0]));
		engine->job_count--;
	}
	engine->jobs[engine->job_count++] =
		(struct prefetch_job){ range->space, at, end, for_reader };
}

static void plan_prefetch(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind)
{
	struct uffd_engine *engine = range->space->engine;
	uint64_t from, to;

	if (!engine->options.prefetch || kind == UFFD_KIND_WP || needs_request(range))
		return;
	for (size_t i = 0; i < engine->job_count; i++)
		if (engine->jobs[i].space == range->space && page >= engine->jobs[i].at &&
		    page < engine->jobs[i].end)
			return;
	prefetch_span(range, page, &from, &to);
	push_job(range, from, page, false);
	push_job(range, page + range->page_size, to,
		 !engine->job_count && to - from > engine->options.prefetch);
}

/* A slice of the newest job; false: dismissed meanwhile. */
static bool fill_slice_of(struct uffd_range *range, struct prefetch_job *job, uint64_t slice,
			  struct fill_run *run_ret)
{
	struct uffd_engine *engine = range->space->engine;
	uint64_t end;

	if (slice < range->page_size)
		slice = range->page_size;
	end = job->end - job->at > slice ? job->at + slice : job->end;
	may_be_held_up(engine);
	*run_ret = fill_absent(range, job->at, end);
	if (!is_back(engine))
		return false;
	job->at = run_ret->past;
	count(engine, COUNTER(prefetched_pages), run_ret->filled >> range->page_shift);
	/* A page that cannot be had now is left to its own fault. */
	if (run_ret->error || job->at >= job->end)
		engine->job_count--;
	return true;
}

bool run_prefetch_slice(struct uffd_engine *engine)
{
	struct prefetch_job *job;
	struct uffd_table *table;
	struct uffd_range *range;
	struct uffd_hold *hold = NULL;
	struct fill_run run;
	bool is_here = true;
	unsigned int shard;
	uint32_t phase;

	if (!engine->job_count)
		return false;
	phase = begin_work(engine);
	job = &engine->jobs[engine->job_count - 1];
	table = job->space->table;
	shard = uffd_table_enter(table, current_cpu());
	range = uffd_table_find(table, job->at);
	if (!range || job->end > range->end || atomic_load(&engine->refusing)) {
		engine->job_count--;
	} else {
		hold = leave_with(table, shard, range, job->at, job->end, engine->leader_id);
		is_here = fill_slice_of(range, job,
					job->for_reader ? SEQUENTIAL_SLICE : PREFETCH_SLICE, &run);
	}
	let_go(table, shard, hold);
	end_work(engine, phase);
	return is_here;
}

/*
 * A reader in sequence that has caught up with the newest job waits for the page
 * that comes next anyway.  Resolving that page alone would wake it for one page,
 * and where both threads share a CPU it would fault on the next before the job
 * got on: a large slice at once serves both.
 */
static bool is_next_in_line(const struct uffd_range *range, uint64_t page,
			    enum uffd_fault_kind kind)
{
	const struct uffd_engine *engine = range->space->engine;
	const struct prefetch_job *job = &engine->jobs[engine->job_count - 1];

	return engine->job_count && kind != UFFD_KIND_WP && job->space == range->space &&
	       job->at == page && job->end <= range->end && !atomic_load(&engine->refusing);
}

static enum outcome resolve_as_leader(struct uffd_range *range, uint64_t page,
				      enum uffd_fault_kind kind)
{
	struct uffd_engine *engine = range->space->engine;
	enum outcome outcome;

	may_be_held_up(engine);
	outcome = resolve_page(range, page, kind);
	return is_back(engine) ? outcome : OUTCOME_DISMISSED;
}

static enum outcome fill_in_line(struct uffd_range *range, uint64_t page,
				 enum uffd_fault_kind kind)
{
	struct uffd_engine *engine = range->space->engine;
	struct prefetch_job *job = &engine->jobs[engine->job_count - 1];

	struct fill_run run;

	if (!fill_slice_of(range, job, SEQUENTIAL_SLICE, &run))
		return OUTCOME_DISMISSED;
	/*
	 * Not filled by this (no content, put off, or not absent: it was dropped since
	 * it was filled): the ordinary way knows what to do.
	 */
	return run.from <= page && page < run.past &&
			       atomic_load(state_of(range, page)) == UFFD_PAGE_CLEAN
		? OUTCOME_RESOLVED : resolve_as_leader(range, page, kind);
}

/* The step */

/* NULL leaves the old block as it was. */
static void *grow(void *block, size_t used, size_t size)
{
	void *larger = uffd_alloc(size);

	if (!larger)
		return NULL;
	if (used)
		memcpy(larger, block, used);
	uffd_free(block);
	return larger;
}

void remember_fault(struct fault_list *list, const struct deferred_fault *fault)
{
	for (size_t i = 0; i < list->count; i++)
		if (list->faults[i].space == fault->space &&
		    list->faults[i].address == fault->address &&
		    fault_kind(list->faults[i].flags) == fault_kind(fault->flags))
			return;
	if (list->count == list->capacity) {
		size_t capacity = list->capacity ? 2 * list->capacity : 64;
		struct deferred_fault *larger = grow(list->faults, list->count * sizeof(*larger),
						     capacity * sizeof(*larger));

		if (!larger) {
			/* Cannot remember it, so let the kernel send it again. */
			uffd_shim_wake(fault->space->fd, fault->address & ~(BASE_PAGE - 1ull),
				       BASE_PAGE);
			return;
		}
		list->faults = larger;
		list->capacity = capacity;
	}
	list->faults[list->count++] = *fault;
}

void forget_faults(struct fault_list *list, const struct uffd_space *space)
{
	size_t kept = 0;

	for (size_t i = 0; i < list->count; i++)
		if (list->faults[i].space != space)
			list->faults[kept++] = list->faults[i];
	list->count = kept;
}

/* Reading may fail for want of descriptors or memory; the message stays queued. */
static bool is_passing(int error)
{
	return error == -EMFILE || error == -ENFILE || error == -ENOMEM;
}

/* At the end saving goes before: a fault would only do one page of it. */
static bool is_left_to_the_end(const struct uffd_range *range, enum uffd_fault_kind kind)
{
	return kind == UFFD_KIND_WP && range->content->preserve && ends(range->space->engine);
}

/* Returns OUTCOME_DEFER when it must be tried again later. */
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

	if (range && is_left_to_the_end(range, kind)) {
		outcome = OUTCOME_IN_FLIGHT;
	} else if (range) {
		page = page_of(range, fault->address);
		hold = leave_with(table, shard, range, page, page + range->page_size,
				  engine->leader_id);
		engine->fault_in_hand = fault;
		in_line = is_next_in_line(range, page, kind);
		if (engine->job_count && !in_line)
			engine->jobs[engine->job_count - 1].for_reader = false;
		outcome = in_line ? fill_in_line(range, page, kind)
				  : resolve_as_leader(range, page, kind);
		if (outcome == OUTCOME_DISMISSED) {
			let_go(table, shard, hold);
			return outcome;
		}
		engine->fault_in_hand = NULL;
		if (outcome == OUTCOME_RESOLVED && !in_line)
			plan_prefetch(range, page, kind);
		/*
		 * Whoever is at this page wakes the waiters of its own space; those of
		 * a fork that shares the page must come back themselves.
		 */
		if (outcome == OUTCOME_IN_FLIGHT && range->content->shared &&
		    atomic_load(&engine->space_count) > 1)
			outcome = OUTCOME_DEFER;
		else if (outcome == OUTCOME_DEFER && last_try)
			outcome = apply_on_error(range, page, -EAGAIN, UFFD_FAILED_RESOLVE,
						 fault->thread_id);
	} else {
		outcome = note_stray(fault, last_try);
	}
	let_go(table, shard, hold);
	uffd_barrier(UFFD_BARRIER_FAULT_WOKEN);
	if (outcome == OUTCOME_RESOLVED)
		note_fault(engine, fault->address, fault->flags, fault->thread_id,
			   fault->since_ns);
	return outcome;
}

void retry_deferred(struct uffd_engine *engine)
{
	uint64_t now = uffd_now_ns();
	struct fault_list *list = &engine->deferred;
	size_t total = list->count, kept = 0;
	uint32_t phase = begin_work(engine);
	enum outcome outcome = OUTCOME_RESOLVED;

	for (size_t i = 0; i < total; i++) {
		struct deferred_fault fault = list->faults[i];
		bool last_try = now - fault.since_ns > engine->options.retry_limit_ns;

		count(engine, COUNTER(retried), 1);
		outcome = handle_fault(engine, &fault, last_try);
		if (outcome == OUTCOME_DISMISSED)
			break;
		if (outcome == OUTCOME_DEFER)
			list->faults[kept++] = fault;
	}
	if (outcome != OUTCOME_DISMISSED)
		list->count = kept;
	end_work(engine, phase);
}

static int64_t drain_and_apply(struct uffd_space *space)
{
	struct message_log *log = &space->engine->shared->log;
	int64_t queued;

	if (!gate_close(space))
		return 0;
	atomic_store_explicit(&log->space, space->number, memory_order_relaxed);
	atomic_fetch_add_explicit(&log->sequence, LOG_MESSAGES, memory_order_release);
	/* One read returns all that is queued. */
	queued = uffd_shim_read(space->fd, log->messages, sizeof(log->messages));
	if (queued == -EAGAIN)
		queued = 0;
	if (queued > 0) {
		queued /= (int64_t)sizeof(*log->messages);
		uffd_barrier(UFFD_BARRIER_STEP_READ);
		/* Layout events first: a fault may be read before the event it comes after. */
		apply_log(space, (size_t)queued);
	}
	gate_leave(space);
	return queued;
}

/* False: dismissed. */
static bool step_space(struct uffd_space *space, uint32_t *handled)
{
	struct uffd_engine *engine = space->engine;
	int64_t queued = drain_and_apply(space);
	enum outcome outcome;
	uint64_t now;

	if (queued < 0) {
		note_failure(engine, 0, 0, (int)queued, UFFD_FAILED_READ);
		say_engine_fails(engine, 0, (int)queued, UFFD_FAILED_READ,
				 is_passing((int)queued) ? "it is tried again"
							 : "its faults are answered no more");
		if (is_passing((int)queued)) {
			sched_yield();
			return true;
		}
		atomic_store(&space->gone, true);
		atomic_fetch_add(&engine->doomed_spaces, 1);
	}
	if (queued <= 0)
		return true;
	uffd_barrier(UFFD_BARRIER_STEP_APPLIED);
	now = uffd_now_ns();
	for (int64_t i = 0; i < queued; i++) {
		const struct uffd_msg *message = &engine->shared->log.messages[i];
		struct deferred_fault fault = {
			.space = space,
			.address = message->arg.pagefault.address,
			.flags = message->arg.pagefault.flags,
			.since_ns = now,
			.thread_id = message->arg.pagefault.ptid,
		};

		if (message->event != UFFD_EVENT_PAGEFAULT)
			continue;
		outcome = handle_fault(engine, &fault, false);
		if (outcome == OUTCOME_DISMISSED)
			return false;
		if (outcome == OUTCOME_DEFER) {
			count(engine, COUNTER(deferred), 1);
			defer_fault(engine, &fault);
		}
	}
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
	/* Reading an event lets its thread go on, too. */
	uint32_t phase = begin_work(engine);

	engine->steps++;
	*handled_ret = 0;
	if (atomic_load(&engine->space_count) > 1)
		step_ready_spaces(engine, handled_ret);
	else if (!atomic_load(&engine->primary->gone))
		step_space(engine->primary, handled_ret);
	end_work(engine, phase);
}
