// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>

#include "barrier.h"
#include "base/clock.h"

#define CHECK_NS 100000

_Atomic uint32_t uffd_barriers_armed;
static _Atomic uint32_t reached;

static void nap(void)
{
	struct timespec pause = { .tv_nsec = CHECK_NS };

	nanosleep(&pause, NULL);
}

/* The first thread stops until released; others pass. */
void uffd_barrier_pass(enum uffd_barrier point)
{
	uint32_t bit = 1u << point;

	if (atomic_fetch_or(&reached, bit) & bit)
		return;
	while (atomic_load(&uffd_barriers_armed) & bit)
		nap();
}

int uffd_barrier_arm(uint32_t point)
{
	uint32_t bit = 1u << point;

	if (point >= UFFD_BARRIERS)
		return -EINVAL;
	if (atomic_load(&uffd_barriers_armed) & bit)
		return -EBUSY;
	atomic_fetch_and(&reached, ~bit);
	atomic_fetch_or(&uffd_barriers_armed, bit);
	return 0;
}

int uffd_barrier_wait(uint32_t point, uint64_t limit_ns)
{
	uint64_t give_up = uffd_now_ns() + limit_ns;

	while (!(atomic_load(&reached) & (1u << point))) {
		if (uffd_now_ns() >= give_up)
			return -ETIMEDOUT;
		nap();
	}
	return 0;
}

void uffd_barrier_release(uint32_t point)
{
	atomic_fetch_and(&uffd_barriers_armed, ~(1u << point));
}
