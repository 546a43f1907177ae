/* SPDX-License-Identifier: MIT */
/* Shared by the engine and its drivers; nobody else includes this. */
#ifndef UFFD_ENGINE_INTERNAL_H
#define UFFD_ENGINE_INTERNAL_H

#include <sched.h>
#include <stdbool.h>

#include "uffd_engine.h"

#define RECENT_PER_SHARD	64
#define PREFETCH_JOBS		64

/* Counters of one CPU: written with relaxed adds, summed up by readers. */
struct stats_shard {
	_Alignas(64) _Atomic uint64_t counters[sizeof(struct uffd_stats) / sizeof(uint64_t)];
	_Atomic uint32_t recent_next;
	struct uffd_recent_fault recent[RECENT_PER_SHARD];
};

#define COUNTER(field) (offsetof(struct uffd_stats, field) / sizeof(uint64_t))

struct deferred_fault {
	uint64_t address;
	uint64_t flags;
	uint64_t since_ns;
	uint32_t thread_id;
};

struct prefetch_job {
	uint64_t at;
	uint64_t end;
	enum uffd_fault_kind kind;
};

struct uffd_engine {
	struct uffd_engine_options options;
	struct uffd_table *table;	/* its own, or the process's for inline */
	struct uffd_table own_table;
	_Atomic uint64_t next_generation;
	_Atomic bool refusing;
	_Atomic bool owner_gone;

	const void *zeros;		/* 2 MiB of zeros to copy from */
	_Atomic(const void *) huge_zeros; /* 1 GiB of them, once such a page is served */

	/* Of the thread that calls step. */
	struct uffd_msg *messages;
	size_t messages_capacity;
	struct deferred_fault *deferred;
	size_t deferred_count;
	size_t deferred_capacity;
	struct prefetch_job jobs[PREFETCH_JOBS];
	size_t job_count;

	_Atomic uint64_t failures;
	_Atomic bool failure_known;	/* the first one is written down */
	struct uffd_failure failure;

	/* The native driver. */
	pthread_t thread;
	bool thread_running;
	int wake_fd;
	_Atomic bool stop;
	_Atomic uint64_t idle_passes;	/* passes of the loop that found nothing left to do */

	struct stats_shard *shards;
};

enum outcome {
	OUTCOME_RESOLVED,
	OUTCOME_DEFER,		/* EAGAIN: the kernel will not send the fault again */
	OUTCOME_IN_FLIGHT,	/* another thread is at this page and will wake its waiters */
	OUTCOME_PRESENT,	/* nothing to do: it was there already (woken) */
	OUTCOME_GONE,		/* range or owner vanished */
	OUTCOME_FAILED,		/* on_error was applied */
};

static inline unsigned int current_cpu(void)
{
	int cpu = sched_getcpu();

	return cpu < 0 ? 0 : (unsigned int)cpu;
}

static inline void count(struct uffd_engine *engine, size_t counter, uint64_t n)
{
	struct stats_shard *shard = &engine->shards[current_cpu() % UFFD_SHARDS];

	atomic_fetch_add_explicit(&shard->counters[counter], n, memory_order_relaxed);
}

enum uffd_fault_kind fault_kind(uint64_t flags);
void note_fault(struct uffd_engine *engine, uint64_t address, uint64_t flags,
		uint32_t thread_id, uint64_t began_ns);
void note_failure(struct uffd_engine *engine, uint64_t address, uint64_t length, int error,
		  enum uffd_failure_stage stage);

/* The one place with the ioctl logic; `page` is aligned.  Async-signal-safe. */
enum outcome resolve_page(struct uffd_engine *engine, struct uffd_range *range, uint64_t page,
			  enum uffd_fault_kind kind);
enum outcome apply_on_error(struct uffd_engine *engine, struct uffd_range *range, uint64_t page,
			    int error, enum uffd_failure_stage stage);

/*
 * Fill the first run of absent pages in [at, end).  Returns where to go on, `end`
 * when nothing is left; the run's own result comes with it.
 */
uint64_t fill_absent(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		     uint64_t end, enum uffd_fault_kind kind, uint64_t limit_ns,
		     int *error_ret, uint64_t *filled_ret);

/* What to fill besides `page`: its chunk, more of them when faults come in sequence. */
void prefetch_span(struct uffd_engine *engine, struct uffd_range *range, uint64_t page,
		   uint64_t *from_ret, uint64_t *to_ret);

/* For the thread that calls step: work that no message asks for. */
bool run_prefetch_slice(struct uffd_engine *engine);
void retry_deferred(struct uffd_engine *engine);

extern struct uffd_table uffd_inline_table;

#endif /* UFFD_ENGINE_INTERNAL_H */
