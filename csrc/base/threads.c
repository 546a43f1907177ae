// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <signal.h>
#include <time.h>

#include "base/threads.h"

int uffd_thread_start(pthread_t *thread_ret, const pthread_attr_t *attributes,
		      void *(*run)(void *), void *argument)
{
	sigset_t all, before;
	int r;

	/* It inherits the mask. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	r = pthread_create(thread_ret, attributes, run, argument);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -r;
}

int uffd_thread_start_detached(pthread_t *thread_ret, size_t stack_size, void *(*run)(void *),
			       void *argument)
{
	pthread_attr_t attributes;
	int r;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (stack_size)
		pthread_attr_setstacksize(&attributes, stack_size);
	r = uffd_thread_start(thread_ret, &attributes, run, argument);
	pthread_attr_destroy(&attributes);
	return r;
}

void uffd_cond_init(pthread_cond_t *condition)
{
	pthread_condattr_t monotonic;

	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(condition, &monotonic);
	pthread_condattr_destroy(&monotonic);
}
