/* SPDX-License-Identifier: MIT */
/* Threads that run no signal handler of the program, and conditions that wait by CLOCK_MONOTONIC. */
#ifndef UFFD_THREADS_H
#define UFFD_THREADS_H

#include <pthread.h>

/* Start a thread that blocks all signals; 0 or -errno. `attributes` may be NULL. */
int uffd_thread_start(pthread_t *thread_ret, const pthread_attr_t *attributes,
		      void *(*run)(void *), void *argument);

/* The same, detached; `stack_size` 0: as usual.  `thread_ret` is valid while the thread exists. */
int uffd_thread_start_detached(pthread_t *thread_ret, size_t stack_size, void *(*run)(void *),
			       void *argument);

/* Its time-outs are times of uffd_now_ns(). */
void uffd_cond_init(pthread_cond_t *condition);

#endif /* UFFD_THREADS_H */
