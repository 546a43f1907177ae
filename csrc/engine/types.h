/* SPDX-License-Identifier: MIT */
/*
 * The engine's input and output: options, counters, failures, requests.
 */
#ifndef UFFD_ENGINE_TYPES_H
#define UFFD_ENGINE_TYPES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/queue.h>

#include "content.h"

struct uffd_engine;

/* A served range, wherever its pieces are now. */
struct uffd_range_ref {
	uint32_t space;
	uint64_t id;		/* never reused */
	uint64_t start;		/* its address when it was served */
};

enum uffd_fault_kind {
	UFFD_KIND_MISSING,
	UFFD_KIND_WP,
	UFFD_KIND_MINOR,
	UFFD_KINDS,
};

/* What to do with a page whose content is unavailable. */
enum uffd_on_error {
	UFFD_ON_ERROR_POISON,	/* a thread that touches it gets SIGBUS */
	UFFD_ON_ERROR_STALL,	/* its threads keep waiting; reported, decided at stop */
	UFFD_ON_ERROR_KILL,	/* SIGKILL the process that touched it */
};

struct uffd_engine_options {
	int32_t fd;		/* borrowed: it must outlive the engine */
	int32_t owner_pid;	/* the process it governs; 0: unknown */
	uint32_t on_error;
	uint32_t is_inline;	/* resolve in the faulting thread (Feature.SIGBUS) */
	uint32_t layout_events;	/* which layout events are on: UFFD_FEATURE_EVENT_* */
	uint32_t watch_owner;	/* the owner is another process: notice its death */
	uint32_t has_workers;	/* how many threads call uffd_engine_next_request */
	uint32_t stall_signal;	/* its handler writes tracebacks when a request stalls; 0: none */
	uint32_t has_gil;	/* this Python has one, see tracebacks.h */
	uint64_t prefetch;	/* bytes filled around a fault, 0: its page alone */
	uint64_t spin_ns;	/* spin for the next fault at most this long */
	uint64_t retry_limit_ns; /* how long a page is retried before on_error */
	uint64_t stall_limit_ns; /* how long a request may take, 0: no limit */
	uint64_t fault_log;	/* demand faults kept for uffd_engine_take_faults; 0: none */
	int32_t say_fd;		/* where to write messages on the first failures; -1: nowhere */
	int32_t keeper_fd;	/* a stream to the keeper (successor.h); borrowed; -1: none */
	void *shared;		/* state for a successor, zeroed before first use; or NULL */
	/* For a stand-in, which resolves nothing until the helper that it stands in for has ended: */
	int32_t helper_pid;	/* the keeper; 0: this engine is no stand-in */
	int32_t helper_pidfd;
	int32_t helper_life;	/* the read end of a pipe that the keeper and its children hold */
};

/* log2 buckets, each divided by 8: latencies are exact to 12.5 %. */
#define UFFD_HISTOGRAM_SUB	8
#define UFFD_HISTOGRAM_BUCKETS	264

struct uffd_stats {
	uint64_t faults[UFFD_KINDS];	/* resolved, by kind */
	uint64_t messages;		/* read; one fault may send several */
	uint64_t filled_pages;		/* by any means, prefetch included */
	uint64_t prefetched_pages;
	uint64_t already_present;	/* fills that found the page present and woke its waiters */
	uint64_t preserved_pages;
	uint64_t deferred;		/* because the layout was changing */
	uint64_t retried;
	uint64_t poisoned_pages;
	uint64_t failed;		/* pages whose content was unavailable */
	uint64_t layout_changed;	/* faults on ranges that were gone */
	uint64_t unserved;		/* faults in registered memory that is not served */
	uint64_t layout_events;
	uint64_t removed_pages;		/* by MADV_DONTNEED and the like */
	uint64_t forks;
	uint64_t requests;		/* for content, to workers */
	uint64_t stalled_requests;	/* not answered in time */
	uint64_t latency_ns[UFFD_KINDS][UFFD_HISTOGRAM_BUCKETS];
};

struct uffd_recent_fault {
	uint64_t time_ns;	/* CLOCK_MONOTONIC when it was resolved */
	uint64_t address;
	uint64_t latency_ns;	/* from the read (inline: from the signal) to resolved */
	uint32_t flags;		/* UFFD_PAGEFAULT_FLAG_* */
	uint32_t thread_id;	/* 0: the kernel does not say */
};

/* A demand fault: one of a missing page, or a minor one. */
struct uffd_logged_fault {
	uint64_t address;
	uint64_t time_ns;	/* CLOCK_MONOTONIC when it was resolved */
	uint32_t flags;		/* UFFD_PAGEFAULT_FLAG_* */
	uint32_t thread_id;	/* 0: the kernel does not say */
	uint64_t space;
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
	UFFD_FAILED_RESOLVE,	/* an ioctl failed */
	UFFD_FAILED_UNSERVED,	/* a fault in memory that is not served */
	UFFD_FAILED_READ,	/* the userfaultfd cannot be read */
	UFFD_FAILED_FORK,	/* a fork could not be followed */
	UFFD_FAILED_STALLED,	/* a request was not answered in time */
	UFFD_FAILED_SAVE,	/* a page's old content could not be saved */
	UFFD_FAILURE_STAGES,
};

/* Pages of one range whose content a worker must fetch, as one run of bytes. */
struct uffd_request {
	TAILQ_ENTRY(uffd_request) link;
	uint64_t id;		/* of the range */
	uint64_t offset;	/* in the range as it was served */
	uint64_t length;
	uint64_t address;	/* at the time of the request */
	uint64_t fault_address;	/* the address that a thread touched, and its page's offset */
	uint64_t fault_offset;
	uint64_t since_ns;
	uint64_t taken_ns;	/* when a worker took it */
	uint32_t space;
	uint32_t thread_id;
	uint32_t worker_id;	/* gettid() of the worker that fetches it */
	uint32_t flags;		/* UFFD_PAGEFAULT_FLAG_* */
	uint32_t is_fault;	/* for a fault, not for populate */
	uint32_t abandoned;	/* on_error was applied: an answer is too late */
	uint32_t reported;	/* as stalled */
	uint64_t page_size;
	struct populate *populate;	/* NULL: for a fault, or its caller has returned */
	struct uffd_pages *pages;	/* of a promised one */
	/* The worker writes these without the lock; copy_request() reads them so. */
	uint32_t answered;	/* its source has returned: the worker puts the pages in place */
	int32_t lacks;		/* why the worker retries that: -ENOMEM or -EAGAIN; else 0 */
};

static inline void copy_request(struct uffd_request *to, const struct uffd_request *from)
{
	memcpy(to, from, offsetof(struct uffd_request, answered));
	to->answered = __atomic_load_n(&from->answered, __ATOMIC_RELAXED);
	to->lacks = __atomic_load_n(&from->lacks, __ATOMIC_RELAXED);
}

#endif /* UFFD_ENGINE_TYPES_H */
