/* SPDX-License-Identifier: MIT */
/* The saver (see saver.h), and its thread, which answers messages. */
#ifndef UFFD_SNAPSHOT_ANSWERING_H
#define UFFD_SNAPSHOT_ANSWERING_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "snapshot/guard.h"
#include "snapshot/saving.h"
#include "snapshot/sweeping.h"
#include "snapshot/unread.h"

struct uffd_saver_options {
	int32_t pid;
	int32_t uffd;
	int32_t pagemap_fd;
	int32_t mem_fd;
	int32_t fd;
	/* Pages of memory between the process and the file. */
	uint64_t memory_pages;
	/* How long a thread of the process may wait; then the protection ends. */
	uint64_t max_stall_ns;
	/* The sweep's limit in bytes a second; 0: none. */
	uint64_t rate;
};

struct uffd_saver_stats {
	uint64_t faults;	/* pages saved because of one */
	uint64_t swept;
	uint64_t before;	/* faults before the instant */
	uint64_t left;		/* pages that are still owed */
	uint64_t dropped;	/* pages given back before they were saved */
	uint64_t longest_ns;	/* no fault has waited for us longer */
	uint64_t wakes;		/* calls that woke threads which waited for a page */
	int32_t error;		/* -errno that ended it; -ETIMEDOUT: of the limit */
};

/* Of noted ranges: more than written. */
#define UFFD_SAVER_CHANGED 1u

struct uffd_saver {
	struct uffd_saver_options options;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct uffd_guard guard;
	struct uffd_saving saving;
	struct uffd_sweep sweep;
	struct uffd_unread unread;
	uint64_t slept_ns; /* until when its thread waited for messages */
	struct uffd_page_ranges noted;	/* in the order of the messages */
	struct uffd_saver_stats stats;
	/*
	 * Calls that wait for the lock; the thread, which often has it, lets them go first.
	 */
	_Atomic uint32_t callers;
	struct uffd_page_ranges ready; /* owed before the instant */
	bool saves, stop;
};

/* These are called with the lock held. */

/* Whether something is still to be saved, or on its way to the file. */
bool uffd_saver_owes(const struct uffd_saver *saver);
/* Answer the messages that can be read; returns whether there were any. */
bool uffd_saver_answer(struct uffd_saver *saver);

/* The thread that answers. */
void *uffd_saver_run(void *saver);

#endif /* UFFD_SNAPSHOT_ANSWERING_H */
