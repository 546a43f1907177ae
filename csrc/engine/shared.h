/* SPDX-License-Identifier: MIT */
/* What outlives an engine whose process is killed: counters, failures, messages under way. */
#ifndef UFFD_ENGINE_SHARED_H
#define UFFD_ENGINE_SHARED_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "table.h"
#include "types.h"
#include "uffd_abi.h"

#define RECENT_PER_SHARD	256

/* Counters of one CPU: written with relaxed adds, summed up by readers. */
struct stats_shard {
	_Alignas(64) _Atomic uint64_t counters[sizeof(struct uffd_stats) / sizeof(uint64_t)];
	_Atomic uint32_t recent_next;
	struct uffd_recent_fault recent[RECENT_PER_SHARD];
};

/*
 * Messages are read into memory that outlives this process.  A layout event is erased
 * once it is applied and reported to the keeper; a successor applies what a killed
 * process left here.  Events are numbered: one may be reported but not yet erased.
 */
#define LOG_MESSAGES		(1u << 16)
struct message_log {
	_Atomic uint64_t sequence;	/* of the first message */
	_Atomic uint32_t space;		/* the messages' source */
	int32_t holder;			/* the process that shares our descriptors; 0: none */
	struct uffd_msg messages[LOG_MESSAGES];
};

/*
 * Demand faults in order.  A thread that resolves one takes the next ticket, unless all
 * places are taken, writes the fault to the ticket's place and publishes it there; nobody
 * waits.  One reader at a time takes what is published, in order, and frees the places.
 */
struct fault_log {
	_Alignas(64) _Atomic uint64_t next;	/* ticket */
	_Atomic uint64_t lost;		/* found no place */
	_Alignas(64) _Atomic uint64_t taken;	/* tickets below are read */
	uint64_t capacity;
	struct log_place {
		_Atomic uint64_t written;	/* the ticket plus one */
		struct uffd_logged_fault fault;
	} places[];
};

/*
 * A page whose content could not be read, or that could not be saved.  It is mended when
 * that has succeeded after all.
 */
#define FAILURES_KEPT		1024
struct failed_page {
	_Atomic uint32_t times;		/* 0: being written */
	_Atomic bool mended;
	uint32_t space;
	uint64_t id;			/* of the range */
	uint64_t offset;
	struct uffd_failure failure;
};

/* Outlives an engine whose process is killed; a `struct fault_log` follows it, if there is one. */
struct engine_shared {
	struct stats_shard shards[UFFD_SHARDS];
	_Atomic uint64_t failures;
	_Atomic uint32_t failed_count;		/* pages of `failed`; larger: some did not fit */
	struct failed_page failed[FAILURES_KEPT];
	_Atomic bool failure_known;	/* `failure` has been written */
	struct uffd_failure failure;
	struct message_log log;
};

#endif /* UFFD_ENGINE_SHARED_H */
