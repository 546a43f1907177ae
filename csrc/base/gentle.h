/* SPDX-License-Identifier: MIT */
/* Work that may last: threads of other programs go first. */
#ifndef UFFD_BASE_GENTLE_H
#define UFFD_BASE_GENTLE_H

/* Have the calling thread go behind others, from now on and for good. */
void uffd_be_gentle(void);
/*
 * Call work(argument) in a thread of a lower priority, and wait for it.  A thread without privileges
 * cannot raise its priority again: so the caller keeps its own.  If there can be no more threads, the
 * caller does the work.
 */
void uffd_gently(void (*work)(void *), void *argument);

#endif /* UFFD_BASE_GENTLE_H */
