/* SPDX-License-Identifier: MIT */
/*
 * The engine's own heap.
 *
 * glibc's fork() holds every malloc lock, and with EVENT_FORK it returns only once the
 * event has been read: a reader in the same process that calls malloc deadlocks
 * (measured).  Nothing here is locked across a fork.
 */
#ifndef UFFD_ALLOC_H
#define UFFD_ALLOC_H

#include <stddef.h>
#include <stdint.h>

/* Zeroed, aligned to 64 bytes; NULL if out of memory.  Not async-signal-safe. */
void *uffd_alloc(size_t size);
void uffd_free(void *memory);
/*
 * In the child of a fork: start with an empty heap.  A thread that does not exist here
 * may have been changing the old one; leak the parent's blocks.
 */
void uffd_alloc_forget_parent(void);
/*
 * For tests: let the nth allocation from now on fail, in any thread; 0: none.  Returns what
 * is left of the number set before; 0 or less: that allocation has failed.
 */
int64_t uffd_alloc_fail_nth(int64_t n);

#endif /* UFFD_ALLOC_H */
