/* SPDX-License-Identifier: MIT */
/*
 * Counters, latencies and recent faults.  Any thread may write them, without a lock;
 * async-signal-safe.
 */
#ifndef UFFD_ENGINE_STATS_H
#define UFFD_ENGINE_STATS_H

#include "core.h"

/* Wait, up to a limit, until all threads now at work on a page have noted its outcome. */
void await_work(struct uffd_engine *engine);
/* Returns false if they are still at it at that time. */
bool await_work_until(struct uffd_engine *engine, uint64_t give_up);

enum uffd_fault_kind fault_kind(uint64_t flags);
void note_fault(struct uffd_engine *engine, uint32_t space, uint64_t address, uint64_t flags,
		uint32_t thread_id, uint64_t began_ns);

void uffd_engine_stats(struct uffd_engine *engine, struct uffd_stats *stats_ret);
/* Missing and minor faults, without await_work(): the latest may not be counted yet. */
uint64_t uffd_engine_fault_count(struct uffd_engine *engine);
uint32_t uffd_engine_recent_count(struct uffd_engine *engine);
/* Newest first; an unspecified choice if there are more than `capacity`. */
uint32_t uffd_engine_recent(struct uffd_engine *engine, struct uffd_recent_fault *recent_ret,
			    uint32_t capacity);
/* The bytes of a log for this many faults, 0 for none. */
uint64_t fault_log_size(uint64_t capacity);
/* Begin a log in zeroed memory, or continue one of a process that was killed. */
void fault_log_open(struct uffd_engine *engine, void *memory);
/*
 * Take the oldest faults of the log, in the order in which they were resolved; returns
 * their number.  `lost_ret`: how many found the log full since the last call.
 */
uint32_t uffd_engine_take_faults(struct uffd_engine *engine,
				 struct uffd_logged_fault *faults_ret, uint32_t capacity,
				 uint64_t *lost_ret);
/* How many there are to take, of faults that the caller has seen resolved at least. */
uint64_t uffd_engine_logged_faults(struct uffd_engine *engine);
uint64_t uffd_histogram_bound(uint32_t bucket);

#endif /* UFFD_ENGINE_STATS_H */
