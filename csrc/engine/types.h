/* SPDX-License-Identifier: MIT */
/*
 * The fault engine: what to do about a fault, without Python.
 *
 * `uffd_engine_step` drains the descriptors, applies the layout events it read and
 * resolves the faults; drivers decide who calls it.  One thread at a time leads:
 * the engine's own (native.c), or a worker that asks for the next page to
 * fetch (request.c).  inline.c does without messages: a SIGBUS handler
 * resolves the fault in the faulting thread.
 */
#ifndef UFFD_ENGINE_H
#define UFFD_ENGINE_H

#include <stdint.h>
#include <sys/queue.h>

#include "barrier.h"
#include "content.h"
#include "fill.h"

struct uffd_engine;

enum uffd_fault_kind {
	UFFD_KIND_MISSING,
	UFFD_KIND_WP,
	UFFD_KIND_MINOR,
	UFFD_KINDS,
};

/* What happens to a page whose content cannot be had. */
enum uffd_on_error {
	UFFD_ON_ERROR_POISON,	/* SIGBUS for whoever touches it */
	UFFD_ON_ERROR_STALL,	/* its threads wait on; reported, decided at stop */
	UFFD_ON_ERROR_KILL,	/* SIGKILL for the process that touched it */
};

struct uffd_engine_options {
	int32_t fd;		/* borrowed: it must outlive the engine */
	int32_t owner_pid;	/* whose memory it governs; 0: unknown */
	uint32_t on_error;
	uint32_t is_inline;	/* resolve in the faulting thread (Feature.SIGBUS) */
	uint32_t has_events;	/* which layout events are on: UFFD_FEATURE_EVENT_* */
	uint32_t watch_owner;	/* the owner is another process: notice its death */
	uint32_t has_workers;	/* uffd_engine_next_request is called */
	uint32_t stall_signal;	/* sent to our own thread when a request stalls; 0: none */
	uint64_t prefetch;	/* bytes filled around a fault, 0: its page alone */
	uint64_t spin_ns;	/* how long to spin for the next fault at most */
	uint64_t retry_limit_ns; /* how long a page is retried before on_error */
	uint64_t stall_limit_ns; /* how long a request may take, 0: for ever */
	int32_t say_fd;		/* where the first failures are said, in words; -1: nowhere */
	int32_t keeper_fd;	/* a stream to the keeper (successor.h); borrowed; -1: none */
	void *shared;		/* zeros at first: what our successor needs; NULL */
};

/* log2 buckets, each cut in 8: a latency is known to 12.5 %. */
#define UFFD_HISTOGRAM_SUB	8
#define UFFD_HISTOGRAM_BUCKETS	264

struct uffd_stats {
	uint64_t faults[UFFD_KINDS];	/* resolved, by kind */
	uint64_t messages;		/* read; one fault may send several */
	uint64_t filled_pages;		/* put in place by any way, prefetch included */
	uint64_t prefetched_pages;
	uint64_t already_present;	/* fills that found the page there, and woke its waiters */
	uint64_t preserved_pages;
	uint64_t deferred;		/* put off because the layout was changing */
	uint64_t retried;
	uint64_t poisoned_pages;
	uint64_t failed;		/* pages whose content could not be had */
	uint64_t layout_changed;	/* faults on ranges that were gone */
	uint64_t unserved;		/* faults on registered ranges that nobody serves */
	uint64_t layout_events;
	uint64_t removed_pages;		/* by MADV_DONTNEED and its like */
	uint64_t forks;
	uint64_t requests;		/* for content, to workers */
	uint64_t stalled_requests;	/* not answered in time */
	uint64_t latency_ns[UFFD_KINDS][UFFD_HISTOGRAM_BUCKETS];
};

struct uffd_recent_fault {
	uint64_t time_ns;	/* CLOCK_MONOTONIC when it was resolved */
	uint64_t address;
	uint64_t latency_ns;	/* from being read (inline: from the signal) to resolved */
	uint32_t flags;		/* UFFD_PAGEFAULT_FLAG_* */
	uint32_t thread_id;	/* 0 where the kernel does not say */
};

struct uffd_failure {
	uint64_t count;
	uint64_t address;	/* of the first */
	uint64_t length;
	int32_t error;		/* of the first: an errno */
	uint32_t stage;		/* enum uffd_failure_stage */
};

enum uffd_failure_stage {
	UFFD_FAILED_NOTHING,
	UFFD_FAILED_SOURCE,	/* the page's content cannot be read */
	UFFD_FAILED_RESOLVE,	/* an ioctl said no */
	UFFD_FAILED_UNSERVED,	/* a fault in a range nobody serves */
	UFFD_FAILED_READ,	/* the userfaultfd cannot be read */
	UFFD_FAILED_FORK,	/* a fork could not be followed */
	UFFD_FAILED_STALLED,	/* a request was not answered in time */
	UFFD_FAILED_SAVE,	/* a page's old content could not be saved */
	UFFD_FAILURE_STAGES,
};

/* Pages of one serving whose content is asked for; the answer is one run of bytes. */
struct uffd_request {
	TAILQ_ENTRY(uffd_request) link;
	uint64_t id;		/* of the serving */
	uint64_t offset;	/* in what was served */
	uint64_t length;
	uint64_t address;	/* where it was when it was asked for */
	uint64_t fault_address;	/* what a thread touched in it, and the page's offset */
	uint64_t fault_offset;
	uint64_t since_ns;
	uint64_t taken_ns;	/* when a worker came for it */
	uint32_t space;
	uint32_t thread_id;
	uint32_t worker_id;	/* gettid() of who fetches it */
	uint32_t flags;		/* UFFD_PAGEFAULT_FLAG_* */
	uint32_t is_fault;	/* a fault asked, not populate */
	uint32_t abandoned;	/* on_error was applied: the answer comes too late */
	uint32_t reported;	/* it takes too long, and somebody was told */
	uint64_t page_size;
	struct populate *populate;	/* NULL: of a fault, or its caller has left */
};

uint64_t uffd_engine_shared_size(void);
/* `call_ret` is the system call that failed, if one did. */
int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret,
		       const char **call_ret);
void uffd_engine_destroy(struct uffd_engine *engine);

/*
 * Serve another userfaultfd as well; borrowed.  Space 0 is the engine's own.
 * `owner_pid`: whose memory it governs, 0 if that is unknown.
 */
int uffd_engine_add_space(struct uffd_engine *engine, int fd, uint32_t has_events,
			  int32_t owner_pid, uint32_t *space_ret);
/* Go on with a space of another engine, under its number; a fork's fd is ours from now on. */
int uffd_engine_adopt_space(struct uffd_engine *engine, int fd, uint32_t is_fork,
			    uint32_t has_events, int32_t owner_pid, uint32_t space);
/* An UNMAP of [start, end) in a space of another engine is still to come. */
int uffd_engine_owe(struct uffd_engine *engine, uint32_t space, uint64_t start, uint64_t end);
/* Before the start: apply what another engine had read and not applied (successor.h). */
void uffd_engine_replay(struct uffd_engine *engine, uint64_t reported);
/*
 * Forget a descriptor whose ranges have been taken out, before it is closed.
 * -EBUSY: a thread that a source holds up may still use it.
 */
int uffd_engine_remove_space(struct uffd_engine *engine, uint32_t space, uint64_t limit_ns);

/*
 * Put a range in, before it is registered.  `id_ret` names it in the calls below,
 * wherever it is moved.  -EEXIST: it overlaps one that is served; -ENODATA: the
 * source ends before the range's last page.
 */
int uffd_engine_add(struct uffd_engine *engine, uint32_t space,
		    const struct uffd_range_spec *spec, uint64_t *id_ret);
int uffd_engine_set_ioctls(struct uffd_engine *engine, uint32_t space, uint64_t id,
			   uint64_t start, uint64_t ioctls);

/*
 * Take a range out of a space and of the forks that have it.  SEAL: first poison
 * what is absent (its content would be zeros otherwise) and lift write-protection;
 * where the range takes no POISON, absent pages are filled instead.  Forks are sealed
 * in any case: memory that goes away here lives on there.  UNREGISTER: what is left
 * of it.  `start` is where it was served.  `patience_ns`: how long to wait for
 * threads at its pages before those are poisoned, too.  After an error it is served
 * as before, as far as it was not taken out.
 */
#define UFFD_UNSERVE_SEAL	1
#define UFFD_UNSERVE_UNREGISTER	2
#define UFFD_UNSERVE_GENTLY	4	/* -ETIME instead of poisoning pages in flight */
int uffd_engine_unserve(struct uffd_engine *engine, uint32_t space, uint64_t id,
			uint64_t start, uint32_t flags, uint64_t patience_ns);

/* Read everything that is queued and resolve it; `handled_ret` counts the messages. */
void uffd_engine_step(struct uffd_engine *engine, uint32_t *handled_ret);

struct uffd_populate_result {
	uint64_t filled;	/* bytes */
	uint64_t failed_at;	/* the first page whose worker has no content; 0: none */
};

/*
 * Fill absent pages now; returns the first error.  Workers are asked for `chunk` bytes
 * at a time, whole pages; 0: for as many as they are quick with.  What fails stays absent.
 */
int uffd_engine_populate(struct uffd_engine *engine, uint32_t space, uint64_t id,
			 uint64_t start, uint64_t offset, uint64_t length, uint64_t chunk,
			 struct uffd_populate_result *result_ret);

/*
 * Save protected pages now, from this thread (`preserve`).  They stay protected, so that
 * a later write shows, unless they are to be unprotected.  `reached_ret`: the offset of
 * the page that could not be saved.
 */
int uffd_engine_preserve(struct uffd_engine *engine, uint32_t space, uint64_t id,
			 uint64_t start, uint64_t offset, uint64_t length, uint32_t unprotect,
			 uint64_t *saved_ret, uint64_t *reached_ret);

/*
 * Write-protect pages, and tell the state of each at the instant when it was protected:
 * a write comes before that and shows in the state, or after it and makes the page dirty
 * anew.  On an error what was protected by then is called dirty again.
 */
int uffd_engine_writeprotect(struct uffd_engine *engine, uint32_t space, uint64_t id,
			     uint64_t start, uint64_t offset, uint64_t length,
			     uint8_t *states_ret);

/* Note the pages that are there already, as far as the owner's page table tells. */
int uffd_engine_take_in(struct uffd_engine *engine, uint32_t space, uint64_t id,
			uint64_t start);

int uffd_engine_states(struct uffd_engine *engine, uint32_t space, uint64_t id,
		       uint64_t start, uint64_t first_page, uint64_t pages,
		       uint8_t *states_ret);

/* Before the end: faults that nobody serves are left to another engine, not refused. */
void uffd_engine_leave_strays(struct uffd_engine *engine);

/* Let everybody who waits ask again: what a dead process had read is lost. */
void uffd_engine_wake_all(struct uffd_engine *engine);

/* From now on, poison every page that is asked for instead of filling it. */
void uffd_engine_refuse(struct uffd_engine *engine);
/*
 * Poison the pages that wait for a worker, of one serving or (id 0) of all; with an
 * error other than 0 that is a failure, which is noted.
 */
void uffd_engine_abandon(struct uffd_engine *engine, uint64_t id, int32_t error);

/* Workers that have not come back with a page that was abandoned. */
uint32_t uffd_engine_hung(struct uffd_engine *engine);

/*
 * The end: whoever leads leaves, every range is sealed and taken out as by unserve.
 * `patience_ns` is for all waits together; while there is work it does not count.
 * -EBUSY: ranges stay registered because they could not be sealed.  Threads may be
 * left behind that a source holds up: see uffd_engine_is_deserted.
 */
int uffd_engine_end(struct uffd_engine *engine, uint64_t patience_ns);
/* From any thread: end drain now, and wait no longer than this for anything. */
void uffd_engine_hurry(struct uffd_engine *engine, uint64_t patience_ns);
/* Changes as long as the end gets on. */
uint64_t uffd_engine_progress(struct uffd_engine *engine);

/* A thread at pages of a serving, perhaps held up there, and what its ioctl may still change. */
struct uffd_held {
	uint64_t id;
	uint64_t start;
	uint64_t length;
	uint32_t thread_id;
	uint32_t is_request;	/* it fetches them: no ioctl is under way */
};

uint32_t uffd_engine_held(struct uffd_engine *engine, struct uffd_held *held_ret,
			  uint32_t capacity);
/* After the end: whether no thread is inside any more, but for callers. */
int uffd_engine_is_deserted(struct uffd_engine *engine);
/* Destroy the engine at this place, if there is one and it is deserted; whether none is left. */
int uffd_engine_discard(struct uffd_engine **engine);

void uffd_engine_stats(struct uffd_engine *engine, struct uffd_stats *stats_ret);
uint32_t uffd_engine_spaces(struct uffd_engine *engine);
uint32_t uffd_engine_owner_exited(struct uffd_engine *engine);
uint32_t uffd_engine_recent_count(struct uffd_engine *engine);
/* Newest first; which ones is left open where there are more than `capacity`. */
uint32_t uffd_engine_recent(struct uffd_engine *engine, struct uffd_recent_fault *recent_ret,
			    uint32_t capacity);
void uffd_engine_failure(struct uffd_engine *engine, struct uffd_failure *failure_ret);
uint64_t uffd_histogram_bound(uint32_t bucket);

/*
 * For workers: wait for a page whose content must be fetched, leading meanwhile
 * when nobody else does.  NULL: the engine is stopping.  The request is the
 * worker's until it completes or fails it.
 */
struct uffd_request *uffd_engine_next_request(struct uffd_engine *engine);
/* `data` holds `request->length` bytes.  -ECANCELED: it came too late. */
int uffd_engine_complete(struct uffd_engine *engine, struct uffd_request *request,
			 const void *data);
/* Both in one call; what goes wrong is counted and noted. */
struct uffd_request *uffd_engine_complete_next(struct uffd_engine *engine,
					       struct uffd_request *request, const void *data);
/*
 * Instead of failing several pages for one that has no content: a fault's own page is
 * asked for by itself, populate's in halves.  Returns 1, or 0 for a page that is alone.
 */
int uffd_engine_ask_again(struct uffd_engine *engine, struct uffd_request *request);
int uffd_engine_fail(struct uffd_engine *engine, struct uffd_request *request, int32_t error);

/* The native driver: one C thread. */
int uffd_native_start(struct uffd_engine *engine, const int32_t *cpus, uint32_t cpu_count,
		      const char **call_ret);
/* Wait until every fault that was waiting at the call is resolved or put off for good. */
int uffd_native_drain(struct uffd_engine *engine, uint64_t limit_ns);

/* End the thread of an engine that serves nothing: another one goes on with its userfaultfds. */
void uffd_native_stop(struct uffd_engine *engine);

/* The inline driver: a SIGBUS handler for the whole process. */
int uffd_inline_start(struct uffd_engine *engine);
/* `to_original`: the action that took our place meanwhile works no more. */
void uffd_inline_stop(struct uffd_engine *engine, uint32_t to_original);
/* Whether the SIGBUS action of the process is ours; put it back on top if it is not. */
int uffd_inline_is_installed(void);
int uffd_inline_reinstall(void);

#endif /* UFFD_ENGINE_H */
