// SPDX-License-Identifier: MIT
/* Closing the gate, so that no page is filled while layout events are applied. */
#define _GNU_SOURCE
#include <time.h>

#include "gate.h"

/* Wait in slices, so that the caller can give up. */
#define GATE_WAIT_NS	20000000
#define NS_PER_S	1000000000

bool gate_try_close(struct uffd_space *space)
{
	pthread_rwlock_t *gate = &space->engine->gate;
	struct timespec until;
	bool is_closed;

	if (!has_gate(space) || pthread_rwlock_trywrlock(gate) == 0)
		return true;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += GATE_WAIT_NS;
	if (until.tv_nsec >= NS_PER_S) {
		until.tv_sec++;
		until.tv_nsec -= NS_PER_S;
	}
	atomic_fetch_add(&space->engine->gate_wanted, 1);
	is_closed = pthread_rwlock_timedwrlock(gate, &until) == 0;
	atomic_fetch_sub(&space->engine->gate_wanted, 1);
	return is_closed;
}

bool gate_close(struct uffd_space *space)
{
	while (!gate_try_close(space))
		if (atomic_load(&space->engine->stop))
			return false;
	return true;
}
