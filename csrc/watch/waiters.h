/* SPDX-License-Identifier: MIT */
/*
 * Which threads wait in the kernel for a userfaultfd, as /proc says, and where.
 * No message is read, since reading an event completes it.  No malloc either: a
 * thread that waits in fork(3) holds its locks.
 */
#ifndef UFFD_WAITERS_H
#define UFFD_WAITERS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/clock.h"
#include "base/line.h"

struct uffd_waiter {
	int32_t thread_id;
	bool is_event;	/* it waits for its event to be read, else for a page */
	uint64_t mark;	/* another one: it has gone on since */
};

struct uffd_fdinfo {
	uint64_t pending;	/* faults whose message nobody has read */
	uint64_t waiting;	/* these, and those that were read and not resolved */
};

/* 0, or -errno: not a userfaultfd, or it cannot be told. */
int uffd_waiters_fdinfo(int fd, struct uffd_fdinfo *info_ret);

/* Threads of a process that wait for any userfaultfd; `pid` 0: of this one. */
uint32_t uffd_waiters_find(int32_t pid, struct uffd_waiter *waiters_ret, uint32_t capacity);
/* Whether it still waits as it did. */
bool uffd_waiters_is_same(int32_t pid, const struct uffd_waiter *waiter);

/*
 * The page that a thread waits for, if it waits for this userfaultfd: UFFDIO_WAKE on
 * a part of the address space makes it fault again, and its message is sent again, if
 * the page lies there.  So this is for faults whose messages nobody has read.  It
 * should be in [low, high).
 */
bool uffd_waiters_page(int fd, int32_t pid, const struct uffd_waiter *waiter, uint64_t low,
		       uint64_t high, uint64_t *page_ret);

/* Also of one that nobody has waited for; not of -1, some process. */
bool uffd_waiters_has_exited(int32_t pid);

/* Put into words: the thread, a page and its mapping, the system call it is in. */
void uffd_waiters_put_thread(struct uffd_line *line, int32_t pid, int32_t thread_id);
void uffd_waiters_put_page(struct uffd_line *line, int32_t pid, uint64_t page);
void uffd_waiters_put_call(struct uffd_line *line, int32_t pid, int32_t thread_id);

#endif /* UFFD_WAITERS_H */
