// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "base/gentle.h"

/*
 * A third of the CPU that a thread of the caller's priority gets beside it.  With much less, a
 * machine that is always busy would never let it come to its end.
 */
#define NICER 5

struct job {
	void (*work)(void *);
	void *argument;
};

static void *run(void *argument)
{
	struct job *job = argument;

	prctl(PR_SET_NAME, "uffd-copy");
	/* On Linux this is about the calling thread alone. */
	setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + NICER);
	job->work(job->argument);
	return NULL;
}

void uffd_gently(void (*work)(void *), void *argument)
{
	struct job job = { work, argument };
	sigset_t all, before;
	pthread_t thread;
	int ret;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = pthread_create(&thread, NULL, run, &job);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (ret)
		work(argument);
	else
		pthread_join(thread, NULL);
}
