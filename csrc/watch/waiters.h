/* SPDX-License-Identifier: MIT */
/*
 * Find the threads that wait in the kernel for a userfaultfd, from /proc.  This reads no
 * messages, since reading an event completes it, and does not call malloc: a thread that
 * waits in fork(3) holds its locks.
 */
#ifndef UFFD_WAITERS_H
#define UFFD_WAITERS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/clock.h"

struct uffd_waiter {
	int32_t thread_id;
	bool is_event;	/* waits for its event to be read, else for a page */
	uint64_t mark;	/* changes once the thread has continued */
	/* The page it waits for is in [low, high); 0 until it is known to wait for ours. */
	uint64_t low, high;
};

struct uffd_fdinfo {
	uint64_t pending;	/* faults whose message has not been read */
	uint64_t waiting;	/* these, and faults read but not resolved */
};

/* 0, or -errno: not a userfaultfd, or its fdinfo cannot be read. */
int uffd_waiters_fdinfo(int fd, struct uffd_fdinfo *info_ret);

/* Find a process's threads that wait for any userfaultfd; `pid` 0: this process. */
uint32_t uffd_waiters_find(int32_t pid, struct uffd_waiter *waiters_ret, uint32_t capacity);
/* Whether the thread has been waiting ever since; a search may have woken it meanwhile. */
bool uffd_waiters_is_same(int32_t pid, const struct uffd_waiter *waiter, bool was_woken);

enum uffd_search {
	UFFD_SEARCH_FOUND,	/* waiter->low is the page */
	UFFD_SEARCH_UNFINISHED,	/* call again: it continues where it stopped */
	UFFD_SEARCH_OTHER,	/* the thread waits for another userfaultfd */
};

/*
 * Find the page that a thread waits for, if it waits for this userfaultfd: UFFDIO_WAKE on
 * a part of the address space makes the thread fault again if the page is in that part.
 * That also sends the message again, so use this only for faults whose messages have not
 * been read.  [low, high): where the page should be.  Takes a second at most; that is too
 * short where the thread waits long for a CPU.
 */
enum uffd_search uffd_waiters_page(int fd, int32_t pid, struct uffd_waiter *waiter,
				   uint64_t low, uint64_t high);

#endif /* UFFD_WAITERS_H */
