/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "toucher.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

/* Held for writing until every thread exists; `aborted` if one could not be created. */
struct gate {
	pthread_rwlock_t lock;
	int aborted;
};

struct toucher {
	struct touch_job *job;
	struct gate *gate;
	pthread_t thread;
	uint64_t begin_ns;
	uint64_t end_ns;
};

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void touch(uint8_t *address, int write)
{
	volatile uint8_t *p = address;

	if (write)
		*p = 1;
	else
		(void)*p;
}

static void pause_for(uint64_t ns)
{
	struct timespec ts = {
		.tv_sec = (time_t)(ns / 1000000000u),
		.tv_nsec = (long)(ns % 1000000000u),
	};

	while (nanosleep(&ts, &ts) == -1 && errno == EINTR)
		;
}

static void *touch_thread(void *arg)
{
	struct toucher *t = arg;
	struct touch_job *job = t->job;

	pthread_rwlock_rdlock(&t->gate->lock);
	pthread_rwlock_unlock(&t->gate->lock);
	if (t->gate->aborted)
		return NULL;
	t->begin_ns = clock_ns(CLOCK_MONOTONIC);
	for (uint64_t i = 0; i < job->count; i++) {
		uint8_t *address = job->base + job->order[i] * job->page_size;

		if (job->pause_ns)
			pause_for(job->pause_ns);
		if (job->ns) {
			uint64_t before = clock_ns(CLOCK_MONOTONIC);

			touch(address, job->write);
			job->ns[i] = clock_ns(CLOCK_MONOTONIC) - before;
		} else {
			touch(address, job->write);
		}
	}
	t->end_ns = clock_ns(CLOCK_MONOTONIC);
	job->cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	return NULL;
}

static int start(struct toucher *t)
{
	pthread_attr_t attr;
	cpu_set_t cpus;
	int err;

	pthread_attr_init(&attr);
	if (t->job->cpu >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET(t->job->cpu, &cpus);
		pthread_attr_setaffinity_np(&attr, sizeof(cpus), &cpus);
	}
	err = pthread_create(&t->thread, &attr, touch_thread, t);
	pthread_attr_destroy(&attr);
	return -err;
}

void touch_order(uint32_t *order, uint64_t count, uint64_t seed)
{
	for (uint64_t i = 0; i < count; i++)
		order[i] = (uint32_t)i;
	for (uint64_t i = count; seed && i > 1; i--) {
		uint32_t last = order[i - 1];
		uint64_t j;

		seed ^= seed << 13;
		seed ^= seed >> 7;
		seed ^= seed << 17;
		j = seed % i;
		order[i - 1] = order[j];
		order[j] = last;
	}
}

int touch_run(struct touch_job *jobs, uint32_t njobs, uint64_t *wall_ns_ret)
{
	struct gate gate = { .lock = PTHREAD_RWLOCK_INITIALIZER };
	uint64_t begin_ns = UINT64_MAX, end_ns = 0;
	struct toucher *touchers;
	uint32_t started = 0;
	int ret = 0;

	touchers = calloc(njobs, sizeof(*touchers));
	if (!touchers)
		return -ENOMEM;
	pthread_rwlock_wrlock(&gate.lock);
	while (started < njobs) {
		touchers[started].job = &jobs[started];
		touchers[started].gate = &gate;
		ret = start(&touchers[started]);
		if (ret)
			break;
		started++;
	}
	gate.aborted = ret != 0;
	pthread_rwlock_unlock(&gate.lock);
	for (uint32_t i = 0; i < started; i++) {
		pthread_join(touchers[i].thread, NULL);
		if (touchers[i].begin_ns < begin_ns)
			begin_ns = touchers[i].begin_ns;
		if (touchers[i].end_ns > end_ns)
			end_ns = touchers[i].end_ns;
	}
	pthread_rwlock_destroy(&gate.lock);
	free(touchers);
	*wall_ns_ret = end_ns - begin_ns;
	return ret;
}
