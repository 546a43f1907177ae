// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/gentle.h"
#include "base/threads.h"

/*
 * A third of the CPU that a thread of the caller's priority gets beside it.  With much less, a
 * machine that is always busy would never let it come to its end.
 */
#define NICER 5
/* The longest that the kernel knows; see sched_setattr(2) and sched(7). */
#define SLICE_NS 100000000u
#define POLICY_NORMAL 0u

/* struct sched_attr of linux/sched/types.h, as Linux 3.14 had it. */
struct attributes {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

struct job {
	void (*work)(void *);
	void *argument;
};

/*
 * A thread that wakes up runs at once if its slice is shorter than that of the running thread
 * (Linux 6.12); otherwise the latter continues for some milliseconds, whatever its priority.  Older
 * kernels ignore this.
 */
static void have_long_slice(void)
{
	struct attributes attributes = { 0 };

	if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) ||
	    attributes.policy != POLICY_NORMAL)
		return;
	attributes.runtime = SLICE_NS;
	syscall(SYS_sched_setattr, 0, &attributes, 0);
}

void uffd_be_gentle(void)
{
	/* On Linux this is about the calling thread alone. */
	setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + NICER);
	have_long_slice();
}

static void *run(void *argument)
{
	struct job *job = argument;

	prctl(PR_SET_NAME, "uffd-copy");
	uffd_be_gentle();
	job->work(job->argument);
	return NULL;
}

void uffd_gently(void (*work)(void *), void *argument)
{
	struct job job = { work, argument };
	pthread_t thread;

	if (uffd_thread_start(&thread, NULL, run, &job))
		work(argument);
	else
		pthread_join(thread, NULL);
}
