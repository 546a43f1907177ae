/* SPDX-License-Identifier: MIT */
/* The structures that the engine's files share, and their accessors. */
#ifndef UFFD_ENGINE_CORE_H
#define UFFD_ENGINE_CORE_H

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/queue.h>
#include <unistd.h>

#include "base/page.h"
#include "hold.h"
#include "placement.h"
#include "shared.h"
#include "table.h"
#include "types.h"
#include "uffd_abi.h"

#define PREFETCH_JOBS		64
/* Pages up to this size are zeroed from `zeros`, larger ones from `huge_zeros`. */
#define ZEROS_SIZE		(2u << 20)
#define HUGE_ZEROS_SIZE		(1u << 30)
/*
 * Prefetch yields to waiting faults after this much: about 50 us of copying, long
 * enough that the extra ioctl does not show.
 */
#define PREFETCH_SLICE		(512u << 10)
/* Descriptors read in one step of an engine that has many. */
#define SPACES_AT_ONCE		64

#define COUNTER(field) (offsetof(struct uffd_stats, field) / sizeof(uint64_t))

/* An unmapping whose event is still to come, see expected.h. */
struct expected_unmap {
	struct expected_unmap *next;
	uint64_t start;
	uint64_t end;
};

/*
 * One address space: a userfaultfd and the ranges served through it.  The first one
 * is the engine's own; forks and adopted descriptors add more.
 */
struct uffd_space {
	LIST_ENTRY(uffd_space) link;
	struct uffd_engine *engine;
	_Atomic uint32_t references;
	uint32_t number;
	int fd;
	bool owned;			/* the fd came with a FORK event and is ours to close */
	int32_t owner_pid;		/* the process it governs; 0: unknown, as for every fork */
	int owner_pidfd;		/* if on_error or a watch needs it; else -1 */
	bool is_here;			/* its memory is this process's own */
	int pagemap_fd;			/* of the owner; -1: cannot be read */
	uint32_t layout_events;	/* which are on: UFFD_FEATURE_EVENT_* */
	_Atomic uint64_t moves;		/* events of moving and unmapping that were applied */
	struct expected_unmap *expected;
	struct uffd_range *vacated;	/* see vacated.h */
	_Atomic bool has_left;		/* pieces in two places, see left.h */
	bool is_put_off;		/* leader only: no descriptor is free for a fork's event */
	_Atomic bool gone;		/* its memory no longer exists */
	struct uffd_table *table;	/* its own, or the process's for inline */
	struct uffd_table own_table;
	struct uffd_table registered;	/* served or not; see registered.h */
	_Atomic bool knows_registered;	/* `registered` is complete */
};

struct deferred_fault {
	struct uffd_space *space;
	uint64_t address;
	uint64_t flags;
	uint64_t since_ns;	/* retried since then */
	uint64_t read_ns;
	uint32_t thread_id;
	struct late_wakes *late;	/* NULL: wake the thread at once; see crowd.h */
};

/* Faults to retry, each page and kind once. */
struct fault_list {
	struct deferred_fault *faults;
	size_t count;
	size_t capacity;
};

struct prefetch_job {
	struct uffd_space *space;
	uint64_t at;
	uint64_t end;
	bool for_reader;	/* sequential; no other fault since it was planned */
};

enum leader {
	LEADER_NONE,
	LEADER_WORKER,		/* a thread inside uffd_engine_next_request */
	LEADER_NATIVE,		/* the engine's own thread */
};

/* A leader that is blocked in a source can be dismissed; it then touches nothing further. */
enum lead_state {
	LEAD_FREE,
	LEAD_HELD_UP,		/* may be blocked: at the pages of a range */
	LEAD_DISMISSED,
};

/* See pause.h. */
struct pause {
	_Atomic uint64_t until_ns;	/* 0: not paused */
	_Atomic uint64_t ended_ns;	/* the last one, or a stop of the process: see loop.c */
};

/* The end of an engine, see end.c. */
struct ending {
	_Atomic bool began;		/* ranges are taken out, none are added */
	_Atomic bool over;		/* a thread that returns now changes nothing */
	_Atomic bool hurried;
	_Atomic int64_t hurried_patience_ns;
	_Atomic int64_t patience_ns;	/* left for all waits together */
	_Atomic uint64_t progress;	/* slices worked on */
	pthread_t thread;		/* the one that ends the engine; valid once `began` */
	bool leads;			/* `thread` also reads the descriptors */
	bool ignores_gate;		/* a blocked thread holds it */
};

TAILQ_HEAD(request_list, uffd_request);

struct uffd_engine {
	struct uffd_engine_options options;
	_Atomic uint64_t next_id;
	_Atomic bool refusing;

	/*
	 * The gate keeps content from landing in a page that was just removed.  A
	 * thread other than the leader that fills pages holds it shared from looking
	 * at a page's state to the end of the ioctl; the leader reads a descriptor and
	 * applies its layout events in one exclusive section.  All spaces share one
	 * gate, since forks share pages.  Lock order: gate, then a table's readers or
	 * its lock; spaces_lock and the requests' lock are taken alone or last.
	 */
	pthread_rwlock_t gate;
	_Atomic uint32_t gate_wanted;	/* threads that wait to close it */

	pthread_mutex_t spaces_lock;
	LIST_HEAD(space_list, uffd_space) spaces;
	struct uffd_table *table;	/* shared by all spaces; NULL: each has its own */
	struct uffd_space *primary;
	_Atomic uint32_t space_count;
	_Atomic uint32_t next_space;	/* higher than every number; set under the lock */
	uint32_t reap_position;
	_Atomic uint32_t doomed_spaces;
	uint64_t last_reap_ns;

	const void *zeros;			/* 2 MiB of zeros to copy from */
	const void *unreadable;			/* a page that cannot be copied from */
	_Atomic(const void *) huge_zeros;	/* 1 GiB of them, once such a page is served */

	/* The leader's: it alone reads descriptors. */
	_Atomic uint32_t lead_state;	/* enum lead_state */
	uint32_t leader_id;		/* gettid() */
	uint64_t applying;	/* number of the layout event being applied */
	struct fault_list deferred;	/* the layout was changing */
	struct fault_list strays;	/* in ranges not served, see stray.c */
	struct fault_list crowd;	/* read at once, see crowd.h */
	bool leaves_strays;		/* to the next reader of the descriptors */
	struct prefetch_job jobs[PREFETCH_JOBS];
	size_t job_count;
	uint64_t steps;
	_Atomic uint64_t forks_followed;
	struct spin {
		uint64_t limit_ns;
		uint64_t now_ns;
		uint64_t last_fault_ns;
		uint64_t rests_until_ns;	/* others want the CPU */
	} spin;
	struct uffd_placement placement;	/* of the engine's own thread */

	/* Pages whose content a worker must fetch, and the leader. */
	pthread_mutex_t requests_lock;
	pthread_cond_t requests_changed;
	pthread_cond_t populates_changed;
	struct request_list queued;
	struct request_list taken;
	struct request_list promised;	/* their content comes by uffd_engine_fill() */
	_Atomic uint32_t promised_count;
	_Atomic uint32_t queued_count;
	_Atomic uint32_t idle_workers;
	enum leader leader;
	pthread_t leader_thread;	/* when a worker leads */
	uint64_t leaderless_since_ns;
	bool watchdog_armed;
	_Atomic uint32_t outstanding;	/* in one of the lists, and not abandoned */
	uint64_t last_taken_ns;

	pthread_mutex_t keeper_lock;	/* one report at a time; taken last */
	pthread_mutex_t registered_lock;	/* for the spaces' `registered` and `vacated` */
	_Atomic uint32_t vacated;	/* places in all spaces' lists */

	pthread_t thread;
	bool inline_started;	/* changed by one thread at a time */
	_Atomic bool thread_running;
	_Atomic bool thread_done;	/* only the join is left */
	int wake_fd;			/* wakes the leader */
	int stop_fd;			/* wakes the thread that stands by */
	int epoll_fd;
	int watchdog_fd;		/* a timer: no thread has led for a while */
	int owner_pidfd;		/* of the primary space, while its exit is watched */
	_Atomic bool is_unwatched;	/* nothing reports the owner's exit: poll for it */
	_Atomic bool owner_exited;
	_Atomic bool stop;
	/* See drain.c. */
	_Atomic uint64_t passes;		/* steps of the loop */
	_Atomic uint64_t deferred_since_ns;	/* the oldest deferred fault; UINT64_MAX: none */
	_Atomic uint64_t given_back;		/* pages absent again that threads may wait for */
	/* Faults that met a page in flight, see wake_turned_away(). */
	_Alignas(64) _Atomic uint64_t turned_away;
	_Atomic uint64_t drained_ns;		/* requests after this time are not drained */

	struct engine_shared *shared;
	struct fault_log *fault_log;	/* NULL: none */
	pthread_mutex_t fault_log_lock;	/* one reader at a time */

	struct uffd_holds holds;
	pthread_mutex_t drop_lock;	/* for taking ranges out: stop() may overtake unserve() */
	pthread_mutex_t lost_lock;
	struct uffd_range *lost;	/* taken out; freed when no longer held */
	struct ending end;
	struct pause pause;

	_Atomic uint32_t said_count;	/* lines written by say.c */
	_Atomic bool said[UFFD_FAILURE_STAGES];

	/* Threads at work on pages, in two phases; see await_work(). */
	pthread_mutex_t await_lock;
	_Atomic uint32_t phase;
	_Atomic uint32_t at_work[2];
};

enum outcome {
	OUTCOME_RESOLVED,
	OUTCOME_DEFER,		/* EAGAIN: the kernel will not send the fault again */
	OUTCOME_STRAY,		/* not served: kept for a while in case it will be */
	OUTCOME_IN_FLIGHT,	/* another thread has this page and will wake its waiters */
	OUTCOME_REQUESTED,	/* its content has been asked for */
	OUTCOME_PRESENT,	/* nothing to do: already present (waiters woken) */
	OUTCOME_GONE,		/* range or owner vanished */
	OUTCOME_FAILED,		/* on_error was applied */
	OUTCOME_POISONED,	/* poisoned before: there is no content */
	OUTCOME_DISMISSED,	/* leader only: another thread ends the engine */
};

/* Counting */

static inline unsigned int current_cpu(void)
{
	int cpu = sched_getcpu();

	return cpu < 0 ? 0 : (unsigned int)cpu;
}

static inline void count(struct uffd_engine *engine, size_t counter, uint64_t n)
{
	struct stats_shard *shard = &engine->shared->shards[current_cpu() % UFFD_SHARDS];

	atomic_fetch_add_explicit(&shard->counters[counter], n, memory_order_relaxed);
}

/*
 * The kernel lets the faulting thread continue before its fault is counted and its
 * page's state is set.  Do both between these two calls: await_work() waits for the
 * threads that were between them when it was called.
 */
static inline uint32_t begin_work(struct uffd_engine *engine)
{
	uint32_t phase = atomic_load_explicit(&engine->phase, memory_order_relaxed);

	atomic_fetch_add(&engine->at_work[phase], 1);
	return phase;
}

static inline void end_work(struct uffd_engine *engine, uint32_t phase)
{
	atomic_fetch_sub_explicit(&engine->at_work[phase], 1, memory_order_release);
}

/* Ranges and their pages */
static inline uint64_t content_offset(const struct uffd_range *range, uint64_t address)
{
	return address - range->start + range->origin;
}

static inline _Atomic uint8_t *state_of(struct uffd_range *range, uint64_t page)
{
	return &range->pages->state[content_offset(range, page) >> range->page_shift];
}

static inline uint64_t page_of(const struct uffd_range *range, uint64_t address)
{
	return range->start + ((address - range->start) & ~(range->page_size - 1));
}

static inline bool can_be_absent(const struct uffd_range *range)
{
	return range->mode & (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
}

static inline bool has_ioctl(const struct uffd_range *range, unsigned int nr)
{
	return atomic_load_explicit(&range->ioctls, memory_order_relaxed) & (UINT64_C(1) << nr);
}

/*
 * Whether this is a stand-in: it resolves faults only once a helper process is killed, and
 * cannot read what that could.
 */
static inline bool stands_in(const struct uffd_engine *engine)
{
	return engine->options.helper_pid;
}

/*
 * Whether it is open.  A range that is not, see open.h, is not served yet: a fault in it is
 * that of a stray.  A stand-in takes over whatever the helper had not opened.
 */
static inline bool is_open(const struct uffd_range *range)
{
	return atomic_load_explicit(&range->ioctls, memory_order_acquire) ||
	       stands_in(range->space->engine);
}

static inline bool is_huge(const struct uffd_range *range)
{
	return range->page_size > BASE_PAGE;
}

static inline void set_states(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state)
{
	for (; at < end; at += range->page_size)
		atomic_store_explicit(state_of(range, at), state, memory_order_release);
}

/* Move `at` to the first page of [*at, end) in this state; return the end of that run. */
static inline uint64_t run_of(struct uffd_range *range, uint64_t *at, uint64_t end, uint8_t state)
{
	uint64_t stop;

	while (*at < end && atomic_load(state_of(range, *at)) != state)
		*at += range->page_size;
	for (stop = *at; stop < end && atomic_load(state_of(range, stop)) == state;)
		stop += range->page_size;
	return *at < end ? stop : end;
}

/* Only a worker can read the source, or some of it. */
static inline bool needs_requests(const struct uffd_range *range)
{
	return range->content->kind == UFFD_SOURCE_REQUEST;
}

/* Only a worker can read this page. */
static inline bool needs_request(const struct uffd_range *range, uint64_t page)
{
	return needs_requests(range) &&
	       uffd_content_is_requested(range->content, content_offset(range, page));
}

/* Whether the page is zeros by what its source is. */
static inline bool is_zeros(const struct uffd_range *range, uint64_t page)
{
	bool zeros;

	uffd_content_stretch(range->content, content_offset(range, page), range->page_size, &zeros);
	return zeros;
}

/* Whether to save old content before the page is written. */
static inline bool preserves(const struct uffd_range *range)
{
	/* A fork's private pages are copies: its writes do not touch the owner's image. */
	return range->content->preserve && (!range->space->owned || range->content->shared);
}

static inline bool loses_content(const struct uffd_range *range)
{
	return can_be_absent(range) && range->content->kind != UFFD_SOURCE_ZERO &&
	       range->content->kind != UFFD_SOURCE_NONE;
}

/* The leader */

static inline void ring(int fd)
{
	uint64_t one = 1;

	if (fd >= 0)
		(void)!write(fd, &one, sizeof(one));
}

static inline void silence(int fd)
{
	uint64_t value;

	(void)!read(fd, &value, sizeof(value));
}

static inline void kick_leader(struct uffd_engine *engine)
{
	ring(engine->wake_fd);
}

static inline bool ends(const struct uffd_engine *engine)
{
	return atomic_load_explicit(&engine->end.began, memory_order_acquire) &&
	       pthread_equal(engine->end.thread, pthread_self());
}

/*
 * Call these two around anything that may block in a source.  is_back() returns false if
 * the leader was dismissed: then touch nothing of the leader's.
 */
static inline void may_be_held_up(struct uffd_engine *engine)
{
	if (!ends(engine))
		atomic_store_explicit(&engine->lead_state, LEAD_HELD_UP, memory_order_release);
}

static inline bool is_back(struct uffd_engine *engine)
{
	uint32_t held_up = LEAD_HELD_UP;

	return ends(engine) ||
	       atomic_compare_exchange_strong(&engine->lead_state, &held_up, LEAD_FREE);
}

static inline bool is_dismissed(struct uffd_engine *engine)
{
	return atomic_load(&engine->lead_state) == LEAD_DISMISSED;
}

#endif /* UFFD_ENGINE_CORE_H */
