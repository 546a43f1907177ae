/* SPDX-License-Identifier: MIT */
/*
 * The fault engine: what to do about a fault, without Python.
 *
 * One engine serves the ranges registered with one userfaultfd.  `uffd_engine_step`
 * drains the descriptor and resolves what it read; a driver decides who calls it:
 * uffd_native.c runs it in a C thread.  uffd_inline.c does without messages: a
 * SIGBUS handler resolves the fault in the faulting thread.
 */
#ifndef UFFD_ENGINE_H
#define UFFD_ENGINE_H

#include <stdint.h>

#include "uffd_fill.h"
#include "uffd_table.h"

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
	UFFD_ON_ERROR_KILL,	/* SIGKILL for the owner */
};

struct uffd_engine_options {
	int32_t fd;		/* borrowed: it must outlive the engine */
	int32_t owner_pid;	/* who registers ranges with it */
	uint32_t on_error;
	uint32_t is_inline;	/* resolve in the faulting thread (Feature.SIGBUS) */
	uint64_t prefetch;	/* bytes filled around a fault, 0: its page alone */
	uint64_t spin_ns;	/* how long to spin for the next fault at most */
	uint64_t retry_limit_ns; /* how long a page is retried before on_error */
};

struct uffd_range_spec {
	uint64_t start;
	uint64_t length;
	uint64_t page_size;
	uint64_t mode;
	uint32_t source;
	int32_t source_fd;	/* FILE: duplicated by the engine */
	uint64_t source_address; /* MEMORY: borrowed until the range is taken out */
	uint64_t source_offset;	/* FILE */
	uint64_t source_length;	/* bytes; must reach into the last page */
	uint64_t local;
	uint64_t preserve;
};

/* log2 buckets, each cut in 8: a latency is known to 12.5 %. */
#define UFFD_HISTOGRAM_SUB	8
#define UFFD_HISTOGRAM_BUCKETS	264

struct uffd_stats {
	uint64_t faults[UFFD_KINDS];	/* resolved, by kind */
	uint64_t messages;		/* read; one fault may send several */
	uint64_t filled_pages;		/* put in place by any way, prefetch included */
	uint64_t prefetched_pages;
	uint64_t already_present;	/* fills that found the page there */
	uint64_t preserved_pages;
	uint64_t deferred;		/* put off because the layout was changing */
	uint64_t retried;
	uint64_t poisoned_pages;
	uint64_t failed;		/* pages whose content could not be had */
	uint64_t layout_changed;	/* faults on ranges that were gone */
	uint64_t unserved;		/* faults on registered ranges that nobody serves */
	uint64_t layout_events;
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
	UFFD_FAILED_LAYOUT,	/* a layout event nobody asked for */
};

int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret);
void uffd_engine_destroy(struct uffd_engine *engine);

/*
 * Put a range in, before it is registered.  `id_ret` names it in the calls below.
 * -EEXIST: it overlaps one that is served; -ENODATA: the source ends before the
 * range's last page.
 */
int uffd_engine_add(struct uffd_engine *engine, const struct uffd_range_spec *spec,
		    uint64_t *id_ret);
int uffd_engine_set_ioctls(struct uffd_engine *engine, uint64_t id, uint64_t ioctls);

/* Take a range out, after it was unregistered; waits for who is still inside. */
int uffd_engine_remove(struct uffd_engine *engine, uint64_t id);

/* Read everything that is queued and resolve it; `handled_ret` counts the messages. */
int uffd_engine_step(struct uffd_engine *engine, uint32_t *handled_ret);

/* Fill absent pages now, from this thread; returns the first error. */
int uffd_engine_populate(struct uffd_engine *engine, uint64_t id, uint64_t offset,
			 uint64_t length, uint64_t *filled_ret);

/* Save and unprotect protected pages now, from this thread (`preserve`). */
int uffd_engine_preserve(struct uffd_engine *engine, uint64_t id, uint64_t offset,
			 uint64_t length, uint64_t *saved_ret);

/*
 * Before unregistering: poison what is still absent (where content is lost
 * otherwise) and take write-protection off.  Where the range takes no POISON,
 * absent pages are filled instead.
 */
int uffd_engine_seal(struct uffd_engine *engine, uint64_t id);

/* From now on, poison every page that is asked for instead of filling it. */
void uffd_engine_refuse(struct uffd_engine *engine);

int uffd_engine_states(struct uffd_engine *engine, uint64_t id, uint64_t first_page,
		       uint64_t pages, uint8_t *states_ret);
int uffd_engine_set_states(struct uffd_engine *engine, uint64_t id, uint64_t first_page,
			   uint64_t pages, uint32_t state);

void uffd_engine_stats(struct uffd_engine *engine, struct uffd_stats *stats_ret);
uint32_t uffd_engine_recent(struct uffd_engine *engine, struct uffd_recent_fault *recent_ret,
			    uint32_t capacity);
void uffd_engine_failure(struct uffd_engine *engine, struct uffd_failure *failure_ret);
uint64_t uffd_histogram_bound(uint32_t bucket);

/* The native driver: one C thread. */
int uffd_native_start(struct uffd_engine *engine, const int32_t *cpus, uint32_t cpu_count);
/* Wait until every fault that was waiting at the call is resolved or put off for good. */
int uffd_native_drain(struct uffd_engine *engine, uint64_t limit_ns);
void uffd_native_stop(struct uffd_engine *engine);

/* The inline driver: a SIGBUS handler for the whole process. */
int uffd_inline_start(struct uffd_engine *engine);
void uffd_inline_stop(struct uffd_engine *engine);
/* Whether the SIGBUS action of the process is ours; put it back on top if it is not. */
int uffd_inline_is_installed(void);
int uffd_inline_reinstall(void);

#endif /* UFFD_ENGINE_H */
