// SPDX-License-Identifier: MIT
/* Time, and pauses between retries. */
#define _GNU_SOURCE
#include <sched.h>
#include <time.h>

#include "clock.h"

/*
 * While a layout event is unread, every filling ioctl fails with EAGAIN, until the
 * thread that caused the event has run again: up to 12 ms on a busy two-CPU machine
 * (measured).  Yield first, since that thread may need this CPU.
 */
#define YIELDS_BEFORE_SLEEP	64
#define SLEEP_NS		50000

uint64_t uffd_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

void uffd_back_off(unsigned int attempt)
{
	struct timespec pause = { .tv_nsec = SLEEP_NS };

	if (attempt < YIELDS_BEFORE_SLEEP)
		sched_yield();
	else
		nanosleep(&pause, NULL);
}
