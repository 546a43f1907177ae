/* SPDX-License-Identifier: MIT */
/*
 * Choose the CPU of the native thread, if the caller named none.
 *
 * The choice matters more than the thread's own work: on the faulting thread's CPU a
 * fault costs half as much as on another one, unless that thread computes between
 * faults, and no message says which CPU it was.  So while faults come in quick
 * succession, try another CPU for a few of them now and then, and keep it if the time
 * from fault to fault gets clearly shorter.
 *
 * A pinned thread that shares its CPU waits for a whole time slice at a time.  So try
 * nothing while there are more runnable threads than CPUs, and end a trial with the
 * first fault that is a millisecond late.
 */
#ifndef UFFD_PLACEMENT_H
#define UFFD_PLACEMENT_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

struct uffd_placement {
	bool free;		/* no CPUs were named */
	cpu_set_t allowed;
	int cpu;		/* pinned to; -1: left to the scheduler */
	int tried;		/* the CPU of the last trial */
	int from;		/* the CPU before the trial; -1: no trial */
	uint64_t mean_ns;	/* between faults in quick succession */
	uint64_t sum_ns;
	uint32_t samples;
	uint32_t wait;		/* faults until the next trial */
	uint32_t interval;
	uint64_t began_ns;	/* the start of this period */
	uint64_t delay_ns;	/* total time runnable but not running, at that start */
};

void uffd_placement_init(struct uffd_placement *placement, bool free);

/* In the thread itself, once. */
void uffd_placement_begin(struct uffd_placement *placement);

/* Note the gap between two faults; up to `limit_ns` they are in quick succession. */
void uffd_placement_note(struct uffd_placement *placement, uint64_t gap_ns, uint64_t limit_ns);

/* The succession of faults is over: end a trial and unpin the thread. */
void uffd_placement_forget(struct uffd_placement *placement);

#endif /* UFFD_PLACEMENT_H */
