/* SPDX-License-Identifier: MIT */
/*
 * Which CPU the native thread runs on, where the caller named none.
 *
 * This decides more than what the thread does: on the faulting thread's CPU a fault
 * costs half as much as on another one, unless that thread computes meanwhile, and
 * no message says which CPU it was.  So while faults come in quick succession another
 * CPU is tried for a few of them now and then, and kept if the time from fault to
 * fault gets clearly shorter.
 *
 * A pinned thread waits for its CPU where others want it too, a whole time slice at
 * a time.  So nothing is tried while more threads can run than there are CPUs, and a
 * trial ends with the first fault that is a millisecond late.
 */
#ifndef UFFD_PLACEMENT_H
#define UFFD_PLACEMENT_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

struct uffd_placement {
	bool free;		/* no CPUs were named */
	cpu_set_t allowed;
	int cpu;		/* where it stays for now; -1: where the scheduler has it */
	int tried;		/* the CPU of the last trial */
	int from;		/* where the trial began; -1: no trial */
	uint64_t mean_ns;	/* between faults in quick succession */
	uint64_t sum_ns;
	uint32_t samples;
	uint32_t wait;		/* faults until the next trial */
	uint32_t interval;
	uint64_t began_ns;	/* what follows is counted from here */
	uint64_t delay_ns;	/* this thread had been runnable and not running */
};

void uffd_placement_init(struct uffd_placement *placement, bool free);

/* In the thread itself, once. */
void uffd_placement_begin(struct uffd_placement *placement);

/* A fault came so long after the one before; below `limit_ns` that is a quick succession. */
void uffd_placement_note(struct uffd_placement *placement, uint64_t gap_ns, uint64_t limit_ns);

/* The succession of faults is over: nothing is known of the next one. */
void uffd_placement_forget(struct uffd_placement *placement);

#endif /* UFFD_PLACEMENT_H */
