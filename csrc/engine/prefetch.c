// SPDX-License-Identifier: MIT
/* Fill ahead of the faults, in the leader's spare time. */
#define _GNU_SOURCE
#include <string.h>

#include "pause.h"
#include "prefetch.h"
#include "range.h"
#include "resolve.h"

/*
 * For a sequential reader, which needs all of it anyway: the end of each ioctl wakes
 * it, and it soon catches up with the next one.  Slices of 512 KiB cost a tenth of the
 * throughput if both threads have their own CPU (measured).
 */
#define SEQUENTIAL_SLICE	(8u << 20)

static void push_job(struct uffd_range *range, uint64_t at, uint64_t end, bool for_reader)
{
	struct uffd_engine *engine = range->space->engine;

	if (at >= end)
		return;
	if (engine->job_count == PREFETCH_JOBS) {
		/* Drop the oldest job: it is the worst guess. */
		memmove(&engine->jobs[0], &engine->jobs[1],
			(PREFETCH_JOBS - 1) * sizeof(engine->jobs[0]));
		engine->job_count--;
	}
	engine->jobs[engine->job_count++] =
		(struct prefetch_job){ range->space, at, end, for_reader };
}

void plan_prefetch(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind)
{
	struct uffd_engine *engine = range->space->engine;
	uint64_t from, to;

	if (!engine->options.prefetch || kind == UFFD_KIND_WP || needs_request(range, page))
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

/* Fill a slice of the newest job; false: the leader was dismissed. */
static bool fill_slice_of(struct uffd_range *range, struct prefetch_job *job, uint64_t slice,
			  struct fill_run *run_ret)
{
	struct uffd_engine *engine = range->space->engine;
	uint64_t end;

	if (slice < range->page_size)
		slice = range->page_size;
	end = job->end - job->at > slice ? job->at + slice : job->end;
	may_be_held_up(engine);
	*run_ret = fill_absent(range, job->at, end, FILL_AHEAD);
	if (!is_back(engine))
		return false;
	job->at = run_ret->past;
	count(engine, COUNTER(prefetched_pages), run_ret->filled >> range->page_shift);
	/* Leave a page that cannot be filled now to its own fault. */
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
	if (is_paused(engine)) {
		end_work(engine, phase);
		return false;
	}
	job = &engine->jobs[engine->job_count - 1];
	table = job->space->table;
	shard = uffd_table_enter(table, current_cpu());
	range = uffd_table_find(table, job->at);
	if (!range || !is_open(range) || job->end > range->end || atomic_load(&engine->refusing)) {
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
 * A sequential reader that has caught up with the newest job waits for the job's next
 * page.  Resolving that page alone would wake the reader for one page, and if both
 * threads share a CPU it would fault on the next before the job continues.  One large
 * slice serves both.
 */
bool is_next_in_line(const struct uffd_range *range, uint64_t page,
			    enum uffd_fault_kind kind)
{
	const struct uffd_engine *engine = range->space->engine;
	const struct prefetch_job *job;

	if (!engine->job_count || kind == UFFD_KIND_WP)
		return false;
	job = &engine->jobs[engine->job_count - 1];
	return job->space == range->space && job->at == page &&
	       job->end <= range->end && !atomic_load(&engine->refusing);
}

enum outcome fill_in_line(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			  const struct deferred_fault *fault)
{
	struct uffd_engine *engine = range->space->engine;
	struct prefetch_job *job = &engine->jobs[engine->job_count - 1];
	struct fill_run run;

	if (!fill_slice_of(range, job, SEQUENTIAL_SLICE, &run))
		return OUTCOME_DISMISSED;
	/*
	 * If this did not fill it (no content, deferred, or dropped since it was filled),
	 * resolve it the ordinary way.
	 */
	return run.from <= page && page < run.past &&
			       atomic_load(state_of(range, page)) == UFFD_PAGE_CLEAN
		? OUTCOME_RESOLVED : resolve_as_leader(range, page, kind, fault);
}

void forget_jobs(struct uffd_engine *engine, const struct uffd_space *space)
{
	size_t kept = 0;

	for (size_t i = 0; i < engine->job_count; i++)
		if (engine->jobs[i].space != space)
			engine->jobs[kept++] = engine->jobs[i];
	engine->job_count = kept;
}
