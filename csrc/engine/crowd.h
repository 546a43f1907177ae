/* SPDX-License-Identifier: MIT */
/*
 * Many threads that wait at once.  A call that wakes makes the kernel look at every thread that
 * waits for the userfaultfd, so that answering n faults one by one takes time by n squared
 * (measured on Linux 6.18: half a millisecond a call with 10,000 threads).  So the pages of a
 * crowd are put in place by address and without waking, and then one call wakes the threads of all
 * pages between two addresses.
 *
 * Whoever uses `struct late_wakes` calls wake_late() before it does anything else, and before
 * anything that may block: a thread never waits for the content of another one's page.
 */
#ifndef UFFD_ENGINE_CROWD_H
#define UFFD_ENGINE_CROWD_H

#include "core.h"

/* Fewer faults, read at once, are no crowd: each is answered by itself. */
#define CROWD		64

/* Threads that wait for pages which are in place.  On the leader's stack. */
struct late_wakes {
	struct uffd_space *space;
	uint64_t from, to;	/* equal: none */
	uint32_t count;
	uint32_t most;
	uint64_t since_ns;
};

/* For a crowd of so many faults. */
struct late_wakes late_wakes_for(size_t faults);
void wake_late(struct late_wakes *late);
/* Wake the threads that wait for a page, soon. */
void wake_later(struct late_wakes *late, struct uffd_space *space, uint64_t page,
		uint64_t page_size);

/* By space and address; the heap of libc must not be used. */
void sort_faults(struct deferred_fault *faults, size_t count);

/* Whether putting a page in place may wait for a disk, a server, or another userfaultfd. */
bool may_block(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind);

#endif /* UFFD_ENGINE_CROWD_H */
