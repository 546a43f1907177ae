/* SPDX-License-Identifier: MIT */
/*
 * Named points where a test can stop a thread of the engine, to cause a race
 * instead of waiting for one.  A point that is not armed costs one load.
 */
#ifndef UFFD_BARRIER_H
#define UFFD_BARRIER_H

#include <stdatomic.h>
#include <stdint.h>

enum uffd_barrier {
	UFFD_BARRIER_STEP_READ,		/* messages read, layout events not applied */
	UFFD_BARRIER_STEP_APPLIED,	/* layout events applied, faults not resolved */
	UFFD_BARRIER_FAULT_CLAIMED,	/* a page is claimed, its ioctl not done */
	UFFD_BARRIER_FAULT_WOKEN,	/* its thread was woken, the fault is not counted */
	UFFD_BARRIER_FILL_CLAIMED,	/* as above, for populate */
	UFFD_BARRIER_PLACED,		/* pages are in place, their states not set */
	UFFD_BARRIER_REQUEST_TAKEN,	/* a worker has a request and no longer leads */
	UFFD_BARRIER_COMPLETE,		/* content has arrived, its page is not looked at */
	UFFD_BARRIER_UNSERVE_SEALED,	/* sealed, not yet unregistered */
	UFFD_BARRIER_LIFTED,		/* a writer continues, its page's state is not set */
	UFFD_BARRIER_EVICT_PLACED,	/* it is known where pages are, they are not read */
	UFFD_BARRIER_EVICT_CLAIMED,	/* pages are about to be dropped inside the gate */
	UFFD_BARRIER_EVICT_DROPPED,	/* pages are dropped, their states not set */
	UFFD_BARRIER_REGISTERED,	/* a range is registered and not open */
	UFFD_BARRIERS,
};

extern _Atomic uint32_t uffd_barriers_armed;

void uffd_barrier_pass(enum uffd_barrier point);

static inline void uffd_barrier(enum uffd_barrier point)
{
	if (__builtin_expect(atomic_load_explicit(&uffd_barriers_armed, memory_order_relaxed) &
			     (1u << point), 0))
		uffd_barrier_pass(point);
}

/* Stop the next thread that reaches the point; -EBUSY if it is armed already. */
int uffd_barrier_arm(uint32_t point);
/* Wait until a thread has stopped at the point; 0 or -ETIMEDOUT. */
int uffd_barrier_wait(uint32_t point, uint64_t limit_ns);
/* Let the thread continue and disarm the point. */
void uffd_barrier_release(uint32_t point);

#endif /* UFFD_BARRIER_H */
