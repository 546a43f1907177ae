/* SPDX-License-Identifier: MIT */
/*
 * A process that ends the protection of a target's memory when nobody answers its faults: this
 * process was stopped by a signal, or waits for its swap.
 */
#ifndef UFFD_SNAPSHOT_GUARD_H
#define UFFD_SNAPSHOT_GUARD_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

/* Shared with the guard. */
struct uffd_guarded {
	/* A time, by uffd_now_ns(): every message that was sent before has been answered. */
	_Atomic uint64_t answered_ns;
	/* A message may have been read that is not answered yet. */
	_Atomic uint32_t busy;
	/* The guard has ended the protection. */
	_Atomic uint32_t ended;
};

struct uffd_guard {
	struct uffd_guarded *shared;
	pid_t pid;
	/* An open /proc/PID/maps for each of the two processes. */
	int32_t maps_fd, its_maps_fd;
};

/* Start it for a target; it ends with the thread that calls this, at the latest. */
int uffd_guard_start(struct uffd_guard *guard, int uffd, int32_t target, uint64_t limit_ns);
/* Lift the protection of all memory: what the guard does, by this process. */
void uffd_guard_lift(const struct uffd_guard *guard, int uffd);
/* Wait until it has ended, and free it. */
void uffd_guard_stop(struct uffd_guard *guard);

#endif /* UFFD_SNAPSHOT_GUARD_H */
