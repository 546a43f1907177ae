/* SPDX-License-Identifier: MIT */
/* Shared by the engine's files and its drivers; nobody else includes this. */
#ifndef UFFD_ENGINE_INTERNAL_H
#define UFFD_ENGINE_INTERNAL_H

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/queue.h>

#include "barrier.h"
#include "types.h"
#include "hold.h"
#include "successor.h"
#include "uffd_owner.h"
#include "placement.h"
#include "table.h"

#define BASE_PAGE		4096u
#define RECENT_PER_SHARD	256
#define PREFETCH_JOBS		64
/* Pages up to this size are zeroed from `zeros`, larger ones from `huge_zeros`. */
#define ZEROS_SIZE		(2u << 20)
#define HUGE_ZEROS_SIZE		(1u << 30)
/*
 * Prefetch yields to waiting faults after this much: some 50 us of copying, and
 * the cost of the extra ioctl is lost in it.
 */
#define PREFETCH_SLICE		(512u << 10)
/* Descriptors served in one step of an engine that has many. */
#define SPACES_AT_ONCE		64

/* Counters of one CPU: written with relaxed adds, summed up by readers. */
struct stats_shard {
	_Alignas(64) _Atomic uint64_t counters[sizeof(struct uffd_stats) / sizeof(uint64_t)];
	_Atomic uint32_t recent_next;
	struct uffd_recent_fault recent[RECENT_PER_SHARD];
};

/*
 * Messages are read into memory that outlives us.  A layout event is erased when it
 * is applied and the keeper knows: what a killed process leaves here, its successor
 * applies.  Each has a number, so that it sees which was reported but not erased.
 */
#define LOG_MESSAGES		(1u << 16)
struct message_log {
	_Atomic uint64_t sequence;	/* of the first message */
	_Atomic uint32_t space;		/* they came from */
	int32_t holder;			/* the process that holds our descriptors; 0: none */
	struct uffd_msg messages[LOG_MESSAGES];
};

/* What outlives an engine whose process is killed. */
struct engine_shared {
	struct stats_shard shards[UFFD_SHARDS];
	_Atomic uint64_t failures;
	_Atomic bool failure_known;	/* the first one is written down */
	struct uffd_failure failure;
	struct message_log log;
};

#define COUNTER(field) (offsetof(struct uffd_stats, field) / sizeof(uint64_t))

/* An unmapping whose event is still to come, see layout.c. */
struct owed_unmap {
	struct owed_unmap *next;
	uint64_t start;
	uint64_t end;
};

/*
 * One address space: a userfaultfd and what is served through it.  The first one
 * is the engine's own; forks and adopted descriptors add more.
 */
struct uffd_space {
	LIST_ENTRY(uffd_space) link;
	struct uffd_engine *engine;
	_Atomic uint32_t references;
	uint32_t number;
	int fd;
	bool owned;			/* the fd came with a FORK event and is ours to close */
	int32_t owner_pid;		/* whose memory it governs; 0: unknown, as of every fork */
	int owner_pidfd;		/* where on_error or a watch needs it; else -1 */
	bool is_here;			/* its memory is this process's own */
	bool events;			/* layout events are on */
	int pagemap_fd;			/* of the owner; -1: cannot be read */
	uint32_t event_features;	/* which: UFFD_FEATURE_EVENT_* */
	struct owed_unmap *owed;
	_Atomic bool gone;		/* the memory it governed is no more */
	struct uffd_table *table;	/* its own, or the process's for inline */
	struct uffd_table own_table;
};

struct deferred_fault {
	struct uffd_space *space;
	uint64_t address;
	uint64_t flags;
	uint64_t since_ns;
	uint32_t thread_id;
};

/* Faults to be looked at again, each page and kind once. */
struct fault_list {
	struct deferred_fault *faults;
	size_t count;
	size_t capacity;
};

struct prefetch_job {
	struct uffd_space *space;
	uint64_t at;
	uint64_t end;
	bool for_reader;	/* in sequence, and nobody else has faulted since it was planned */
};

enum leader {
	LEADER_NONE,
	LEADER_WORKER,		/* a thread inside uffd_engine_next_request */
	LEADER_NATIVE,		/* the engine's own thread */
};

/* Where the leader is: one that a source holds up can be dismissed, and comes back to nothing. */
enum lead_state {
	LEAD_FREE,
	LEAD_HELD_UP,		/* or may be: at the pages of a range */
	LEAD_DISMISSED,
};

/* The end of an engine (end.c). */
struct ending {
	_Atomic bool began;		/* ranges go, none is put in any more */
	_Atomic bool over;		/* who comes back now leaves everything as it is */
	_Atomic bool hurried;
	_Atomic int64_t hurried_patience_ns;
	_Atomic int64_t patience_ns;	/* left for waiting, all waits together */
	_Atomic uint64_t progress;	/* slices that were worked on */
	pthread_t thread;		/* that ends it; once it began */
	bool leads;			/* and reads the descriptors meanwhile */
	bool ignores_gate;		/* somebody holds it and is held up */
};

TAILQ_HEAD(request_list, uffd_request);

struct uffd_engine {
	struct uffd_engine_options options;
	_Atomic uint64_t next_id;
	_Atomic bool refusing;

	/*
	 * The gate keeps content from landing in a page that was removed meanwhile.
	 * Whoever fills pages beside the leader holds it shared from looking at a
	 * page's state to the end of the ioctl; reading a descriptor and applying the
	 * layout events that were read is one exclusive section.  It is one for all
	 * spaces, since forks share pages.  Lock order: gate, then a table's readers or
	 * its lock; spaces_lock and the requests' lock are taken alone or last.
	 */
	pthread_rwlock_t gate;

	pthread_mutex_t spaces_lock;
	LIST_HEAD(, uffd_space) spaces;
	struct uffd_space *primary;
	_Atomic uint32_t space_count;
	uint32_t next_space;
	uint32_t reap_position;
	_Atomic uint32_t doomed_spaces;
	uint64_t last_reap_ns;

	const void *zeros;			/* 2 MiB of zeros to copy from */
	_Atomic(const void *) huge_zeros;	/* 1 GiB of them, once such a page is served */

	/* Of the thread that leads: it alone reads descriptors. */
	_Atomic uint32_t lead_state;	/* enum lead_state */
	uint32_t leader_id;		/* gettid() */
	uint64_t applying;	/* the number of the layout event that is being applied */
	struct fault_list deferred;	/* the layout was changing */
	struct fault_list strays;	/* nobody serves them, stray.c */
	bool leaves_strays;		/* to whoever reads the descriptors after us */
	struct prefetch_job jobs[PREFETCH_JOBS];
	size_t job_count;
	uint64_t steps;
	_Atomic uint64_t forks_followed;
	const struct deferred_fault *fault_in_hand;
	struct spin {
		uint64_t limit_ns;
		uint64_t now_ns;
		uint64_t last_fault_ns;
	} spin;
	struct uffd_placement placement;	/* of the engine's own thread */

	/* Pages whose content somebody must fetch, and who leads. */
	pthread_mutex_t requests_lock;
	pthread_cond_t requests_changed;
	pthread_cond_t populates_changed;
	struct request_list queued;
	struct request_list taken;
	_Atomic uint32_t queued_count;
	_Atomic uint32_t idle_workers;
	enum leader leader;
	pthread_t leader_thread;	/* when a worker leads */
	uint64_t leaderless_since_ns;
	bool watchdog_armed;
	_Atomic uint32_t outstanding;	/* queued and taken, and not abandoned */
	uint64_t last_taken_ns;

	pthread_mutex_t keeper_lock;	/* one report at a time; taken last */

	pthread_t thread;
	bool inline_started;	/* changed by one thread at a time */
	_Atomic bool thread_running;
	_Atomic bool thread_done;	/* it only has to be joined */
	int wake_fd;			/* wakes the leader */
	int stop_fd;			/* wakes the thread that stands by */
	int epoll_fd;
	int watchdog_fd;		/* a timer: no thread has led for a while */
	int owner_pidfd;		/* of the primary space, while its exit is watched for */
	_Atomic bool is_unwatched;	/* nothing tells of the owner's exit: it must be asked for */
	_Atomic bool owner_exited;
	_Atomic bool stop;
	_Atomic uint64_t idle_passes;	/* passes of the loop that found nothing left to do */

	struct engine_shared *shared;

	struct uffd_holds holds;
	pthread_mutex_t lost_lock;
	struct uffd_range *lost;	/* taken out, and freed when nobody holds them */
	struct ending end;

	_Atomic uint32_t said_count;	/* lines on stderr, say.c */
	_Atomic bool said[UFFD_FAILURE_STAGES];

	/* Threads at work on pages, in two phases; see await_work(). */
	pthread_mutex_t await_lock;
	_Atomic uint32_t phase;
	_Atomic uint32_t at_work[2];
};

enum outcome {
	OUTCOME_RESOLVED,
	OUTCOME_DEFER,		/* EAGAIN: the kernel will not send the fault again */
	OUTCOME_STRAY,		/* nobody serves it: waited for, for a while */
	OUTCOME_IN_FLIGHT,	/* another thread is at this page and will wake its waiters */
	OUTCOME_REQUESTED,	/* its content has been asked for */
	OUTCOME_PRESENT,	/* nothing to do: it was there already (woken) */
	OUTCOME_GONE,		/* range or owner vanished */
	OUTCOME_FAILED,		/* on_error was applied */
	OUTCOME_POISONED,	/* it was poisoned before: there is no content */
	OUTCOME_DISMISSED,	/* for the leader: another thread ends the engine */
};

/* stats.c */
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
 * The kernel lets the faulting thread go on before we have counted its fault and
 * noted its page's state.  So both happen between these two, and readers wait for
 * whoever was in between when they came.
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

void await_work(struct uffd_engine *engine);

enum uffd_fault_kind fault_kind(uint64_t flags);
void note_fault(struct uffd_engine *engine, uint64_t address, uint64_t flags,
		uint32_t thread_id, uint64_t began_ns);
void note_failure(struct uffd_engine *engine, uint64_t address, uint64_t length, int error,
		  enum uffd_failure_stage stage);

/* say.c: a line on stderr, before the first page is lost.  Async-signal-safe. */
void say_page_fails(struct uffd_range *range, uint64_t page, int error,
		    enum uffd_failure_stage stage);
void say_engine_fails(struct uffd_engine *engine, uint64_t address, int error,
		      enum uffd_failure_stage stage, const char *consequence);

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
	return __atomic_load_n(&range->ioctls, __ATOMIC_RELAXED) & (UINT64_C(1) << nr);
}

static inline bool is_huge(const struct uffd_range *range)
{
	return range->page_size > BASE_PAGE;
}

void set_states(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state);

/* space.c */
/* `owner_pid`: 0: unknown.  -ESRCH: that process has exited, and its memory lives on. */
int space_create(struct uffd_engine *engine, int fd, bool owned, uint32_t event_features,
		 int32_t owner_pid, struct uffd_space **ret);
struct uffd_space *space_get(struct uffd_engine *engine, uint32_t number);
void space_put(struct uffd_space *space);
void space_retire(struct uffd_space *space);
bool space_is_dead(struct uffd_space *space);
/* SIGKILL for the process whose memory it is; of a fork, for that of the faulting thread. */
int space_kill(struct uffd_space *space, uint32_t thread_id, uint64_t address);
/* Whether a thread of the owner is changing the layout, and waits for its event to be read. */
bool layout_is_changing(struct uffd_space *space);
/* Wait, for a while, until none is. */
void wait_for_layout(struct uffd_space *space);
bool layout_is_changing(struct uffd_space *space);

static inline bool ends(const struct uffd_engine *engine)
{
	return atomic_load_explicit(&engine->end.began, memory_order_acquire) &&
	       pthread_equal(engine->end.thread, pthread_self());
}

static inline bool has_gate(const struct uffd_space *space)
{
	return space->events && !(ends(space->engine) && space->engine->end.ignores_gate);
}

static inline void gate_enter(struct uffd_space *space)
{
	if (has_gate(space))
		pthread_rwlock_rdlock(&space->engine->gate);
}

/*
 * A source may hold up whoever is inside.  The first one waits for some
 * milliseconds, the second one until the engine stops; false: not closed.
 */
bool gate_try_close(struct uffd_space *space);
bool gate_close(struct uffd_space *space);

static inline void gate_leave(struct uffd_space *space)
{
	if (has_gate(space))
		pthread_rwlock_unlock(&space->engine->gate);
}

/*
 * Between entering and leaving a table: take hold of what was found there, and
 * leave.  Where no hold is to be had the reader stays inside.
 */
static inline struct uffd_hold *leave_with(struct uffd_table *table, unsigned int shard,
					   struct uffd_range *range, uint64_t start, uint64_t end,
					   uint32_t thread_id)
{
	struct uffd_hold *hold =
		uffd_hold_take(&range->space->engine->holds, range, start, end, thread_id);

	if (hold)
		uffd_table_leave(table, shard);
	return hold;
}

static inline void let_go(struct uffd_table *table, unsigned int shard, struct uffd_hold *hold)
{
	if (hold)
		uffd_hold_release(hold);
	else
		uffd_table_leave(table, shard);
}

/* Out of the table: free it, now or when nobody is at it any more. */
void range_discard(struct uffd_range *range);
/* Take it out, too. */
void range_remove(struct uffd_range *range);
/* Returns whether none is left. */
bool free_lost(struct uffd_engine *engine);

struct uffd_range *range_create(struct uffd_space *space, const struct uffd_range *like,
				uint64_t start, uint64_t end, uint64_t origin);
void range_free(struct uffd_range *range);
/* The piece of a serving that holds an offset; `hint` is where it was. */
struct uffd_range *find_piece(struct uffd_space *space, uint64_t id, uint64_t offset,
			      uint64_t hint);
struct uffd_range *any_piece(struct uffd_space *space, uint64_t id, uint64_t hint);

/* put.c: the ioctls that put pages in place.  Async-signal-safe. */
enum fill_for {
	FILL_MISSING,	/* a missing fault: the page itself */
	FILL_MINOR,	/* a minor fault: the page cache holds it */
	FILL_AHEAD,	/* whoever may fault later */
};

int put_zeros(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
	      struct uffd_fill_result *result_ret);
int put_continue(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret);
/* Pages [at, at + length) from memory of this process. */
int put_bytes(struct uffd_range *range, uint64_t at, uint64_t length, uint64_t source,
	      enum fill_for why, struct uffd_fill_result *result_ret);
/*
 * Absent pages, claimed by the caller; a run never crosses into the content's tail.  How
 * they get their content is decided here, whoever asks: through the page cache where the
 * range says so, else by a copy, where the mode has MISSING, else (and for a minor fault) from
 * the page cache as it is.
 */
int put_content(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
		struct uffd_fill_result *result_ret);
void *local_address(const struct uffd_range *range, uint64_t at);
int poison_pages(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret);
/* One page, for good; returns its state now. */
uint8_t poison_one(struct uffd_range *range, uint64_t page, bool *put_off_ret);
void poison_page(struct uffd_range *range, uint64_t page);

/*
 * page_table.c: what the owner's page table says.  Async-signal-safe.
 * Entries of `pages` pages of a range; false where they cannot be read.
 */
bool read_entries(const struct uffd_range *range, uint64_t at, uint64_t pages,
		  uint64_t *entries_ret);
/* How much of a run, from its first page on, is mapped nowhere in the owner for sure. */
uint64_t unmapped_run(const struct uffd_range *range, uint64_t at, uint64_t length);
int open_page_table(int pid);
/* A state of ours, corrected by what the page table says. */
uint8_t seen_state(const struct uffd_range *range, uint8_t state, uint64_t entry);

/* resolve.c: what to do about a page.  Async-signal-safe. */
enum outcome resolve_page(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind);
/* `thread_id`: of the thread that waits; 0 where the kernel does not say. */
enum outcome apply_on_error(struct uffd_range *range, uint64_t page, int error,
			    enum uffd_failure_stage stage, uint32_t thread_id);
/* A fill has put pages in [at, past), or found them there. */
void set_filled(struct uffd_range *range, uint64_t at, uint64_t past,
		const struct uffd_fill_result *result);
/* A fill says that the huge page is there, on so many occasions that it cannot be. */
bool lacks_huge_page(struct uffd_range *range, uint64_t page, uint64_t occasion);
#define EXISTS_LIMIT		8
void unclaim(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state);
/*
 * A run of pages that were filled.  Whoever waited in [from, past) was woken, by the
 * ioctl or because the page was there; `past` is where to go on.
 */
struct fill_run {
	uint64_t from, past;
	uint64_t filled;	/* bytes */
	int error;		/* of the page at `past` */
};

/* Fill the first run of absent pages in [at, end); an empty one at `end`: none is left. */
struct fill_run fill_absent(struct uffd_range *range, uint64_t at, uint64_t end);
/* What to fill besides `page`: its chunk, more of them when faults come in sequence. */
void prefetch_span(struct uffd_range *range, uint64_t page, uint64_t *from_ret,
		   uint64_t *to_ret);
/* The source cannot be read without asking somebody. */
static inline bool needs_request(const struct uffd_range *range)
{
	return range->content->kind == UFFD_SOURCE_REQUEST;
}

/* layout.c: for the leader, inside the closed gate. */
void apply_layout_event(struct uffd_space *space, const struct uffd_msg *message);
/* Apply the first `count` messages of the log and erase them, but for faults. */
void apply_log(struct uffd_space *space, size_t count);
/* An UNMAP of [start, end) is still to come. */
void owe(struct uffd_space *space, uint64_t start, uint64_t end);
/* What is put in [start, end) now was mapped after every unmapping that is owed there. */
void forget_owed(struct uffd_space *space, uint64_t start, uint64_t end);

/* successor.c */
void report_added(const struct uffd_range *range);
void report_dropped(struct uffd_engine *engine, uint32_t space, uint64_t id);
void report_pieces(struct uffd_space *space);
void report_fork(struct uffd_space *child, int states_fd);
void report_gone(struct uffd_space *space);

/* serve.c */
/* Between open and shut nothing that is found goes away, nor does the layout change. */
struct visit {
	struct uffd_space *space;
	unsigned int shard;
	uint32_t phase;
	struct uffd_hold *hold;
};

bool open_visit(struct uffd_engine *engine, uint32_t number, struct visit *visit);
void shut_visit(struct visit *visit);
void wake_again(struct uffd_range *range, uint64_t at, uint64_t end);

/*
 * Work on [offset, end) of a serving in slices, with the gate opened and shut for
 * each.  `work` says how far it came; EAGAIN and ENOMEM may pass.  `reach` says what
 * memory of this process the next of it will touch, and how far that goes.
 */
struct reach {
	struct uffd_content *content;
	uint64_t read, read_length;
	uint64_t write, write_length;
};

typedef uint64_t (*slice_work)(struct uffd_range *range, uint64_t at, uint64_t end,
			       int *error_ret, uint64_t *done_ret);
typedef uint64_t (*slice_reach)(struct uffd_range *range, uint64_t at, uint64_t end,
				struct reach *reach);

struct slices {
	struct uffd_engine *engine;
	uint32_t number;	/* of the space */
	uint64_t id, start;
	uint64_t offset, end;
	slice_work work;
	slice_reach reach;	/* NULL: nothing that could hold anybody up */
};

int do_slice(const struct slices *all, uint64_t *offset, uint64_t *done_ret);
/* `reached_ret`: the offset where it stopped. */
int for_slices(const struct slices *all, uint64_t *done_ret, uint64_t *reached_ret);
/* The first pages in [*at, end) that are in this state: `at` is moved there, and their end returned. */
uint64_t run_of(struct uffd_range *range, uint64_t *at, uint64_t end, uint8_t state);

/* save.c */
/* Whether old content is to be saved before the page is written. */
bool preserves(const struct uffd_range *range);
/* A claimed page whose protection holds.  -EFAULT, -EPERM, ...: it is not saved. */
int save_page(struct uffd_range *range, uint64_t page);
/* The memory is gone: what of it was still to be saved cannot be. */
void note_unsaved(struct uffd_range *range);
uint64_t preserve_slice(struct uffd_range *range, uint64_t at, uint64_t end, int *error_ret,
			uint64_t *done_ret);
uint64_t preserve_reach(struct uffd_range *range, uint64_t at, uint64_t end, struct reach *reach);

/* engine.c */
int watch_space(struct uffd_engine *engine, struct uffd_space *space);
/* For the leader. */
void forget_space(struct uffd_engine *engine, struct uffd_space *space);
void reap_spaces(struct uffd_engine *engine, uint32_t most);

/* step.c: for the leader. */
bool run_prefetch_slice(struct uffd_engine *engine);
void retry_deferred(struct uffd_engine *engine);
void remember_fault(struct fault_list *list, const struct deferred_fault *fault);
static inline void defer_fault(struct uffd_engine *engine, const struct deferred_fault *fault)
{
	remember_fault(&engine->deferred, fault);
}
void forget_faults(struct fault_list *list, const struct uffd_space *space);

/* stray.c: for the leader. */
enum outcome note_stray(const struct deferred_fault *fault, bool last_try);
/* Refuse those that have waited too long, or all; returns when the next one has. */
uint64_t refuse_strays(struct uffd_engine *engine, bool all);

/* populate.c */
/* One call that workers fetch pages for, on its stack; under the requests' lock. */
struct populate {
	uint64_t chunk;		/* bytes to ask for at a time, now */
	uint64_t limit;		/* and at most */
	bool paced;		/* between a page and `limit`, as quickly as answers come */
	uint32_t queued;	/* requests that no worker has taken */
	uint32_t outstanding;	/* those and the taken ones */
	uint64_t filled;	/* bytes */
	uint64_t failed_at;	/* the first page without content, and why */
	int error;
};

struct serving {
	uint32_t space;
	uint64_t id;
	uint64_t start;
};

int populate_by_request(struct uffd_engine *engine, const struct serving *serving,
			uint64_t page_size, uint64_t offset, uint64_t end, uint64_t chunk,
			struct uffd_populate_result *result);
/* Both with the requests' lock held, for any request. */
void populate_taken(struct uffd_engine *engine, struct uffd_request *request);
void populate_answered(struct uffd_engine *engine, struct uffd_request *request, uint64_t filled,
		       int error);

/* request.c */
/* Either a fault asks, or a call of populate. */
bool queue_request(struct uffd_range *range, uint64_t at, uint64_t end,
		   const struct deferred_fault *fault, struct populate *populate);
void free_requests(struct uffd_engine *engine);
/* The timer has fired: whether nobody has led for so long; with the requests' lock held. */
bool leads_after_watchdog(struct uffd_engine *engine);
/* Apply on_error to requests that are older; returns when the next one will be. */
uint64_t fail_stalled_requests(struct uffd_engine *engine);

/* native.c */
/* Run the loop until there is a request (a worker), or a worker wants to lead, or stop. */
void lead(struct uffd_engine *engine, enum leader role);
void kick_leader(struct uffd_engine *engine);
void native_close(struct uffd_engine *engine);
/* Tell whoever leads, or could, to leave. */
void native_end(struct uffd_engine *engine);

/* end.c */
/* Around what a source may hold up; false: dismissed, nothing of the leader's may be touched. */
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

/* How long taking ranges out may wait for others, all waits together. */
struct patience {
	struct uffd_engine *engine;
	int64_t left_ns;	/* not for the end: that has the engine's */
	bool is_gentle;		/* then give up, and poison no page in flight */
	unsigned int attempt;
};

/* Wait a little; false: it has been long enough. */
bool wait_on(struct patience *patience);
/* Between two pieces of work. */
void rest(struct patience *patience);

/* unserve.c */
int unserve_in(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t start,
	       uint32_t flags, struct patience *patience);
bool loses_content(const struct uffd_range *range);

extern struct uffd_table uffd_inline_table;

/* inline.c: in the child of a fork. */
void inline_forget_parent(void);

#endif /* UFFD_ENGINE_INTERNAL_H */
