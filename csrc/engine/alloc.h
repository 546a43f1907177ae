/* SPDX-License-Identifier: MIT */
/*
 * Memory for the engine, from a heap of its own.
 *
 * glibc's fork() holds every lock of malloc, and with EVENT_FORK it returns only
 * when somebody has read the event: a reader in the same process that calls malloc
 * waits for ever (measured).  Nothing here is locked across a fork.
 */
#ifndef UFFD_ALLOC_H
#define UFFD_ALLOC_H

#include <stddef.h>

/* Zeroed, aligned to 64 bytes; NULL when memory is short.  Not async-signal-safe. */
void *uffd_alloc(size_t size);
void uffd_free(void *memory);
/*
 * In the child of a fork: begin anew.  A thread that does not exist there may have
 * been in the middle of a change; what the parent had is left alone.
 */
void uffd_alloc_forget_parent(void);

#endif /* UFFD_ALLOC_H */
