/* SPDX-License-Identifier: MIT */
/* Have Python write the tracebacks of all threads. */
#ifndef UFFD_ENGINE_TRACEBACKS_H
#define UFFD_ENGINE_TRACEBACKS_H

#include <stdbool.h>

/*
 * Run the handler of a signal (faulthandler.register), once.
 *
 * The handler follows the frames of all threads, and crashes if they run meanwhile.  So it runs in
 * a thread that has the GIL (`has_gil`: this Python has one).  If the GIL does not come free, its
 * owner waits in the kernel or computes in C; the handler then runs without it, in a process that
 * shares the memory, so that only that process ends if the guess was wrong.  Waits for 0.2 s at
 * most, and as long as it takes to write to stderr.
 */
void uffd_show_tracebacks(int number, bool has_gil);

/* In the child of a fork: it has no such thread, and the lock may be the parent's. */
void uffd_tracebacks_forget_parent(void);

#endif /* UFFD_ENGINE_TRACEBACKS_H */
