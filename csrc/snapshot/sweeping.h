/* SPDX-License-Identifier: MIT */
/*
 * Save the owed pages that nobody waits for, in a thread that lets others go first.
 *
 * It takes no lock: while it has no CPU, faults are answered.  The thread that answers them tells it
 * what to read, and decides what of that is saved.
 */
#ifndef UFFD_SNAPSHOT_SWEEPING_H
#define UFFD_SNAPSHOT_SWEEPING_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "remote/cold.h"
#include "snapshot/saving.h"

/* Pages of a step: they stay in a CPU's cache between being read and being written. */
#define UFFD_SWEEP_PAGES 128u

/* Pages of one piece. */
struct uffd_sweep_step {
	struct uffd_owed_piece *piece;
	uint64_t address;
	uint64_t pages; /* 0: none */
	uint64_t offset;
	_Atomic uint8_t *states;
};

struct uffd_sweep {
	pthread_t thread;
	struct uffd_saving *saving;
	int32_t fd; /* of the file */
	uint64_t rate;
	uint64_t began_ns;
	void *memory;
	struct uffd_cold cold;
	/* eventfd(2): the sweeper has done its step, and the sweeper has a step to do. */
	int said_fd, told_fd;
	/*
	 * While the sweeper works, what follows is its own; otherwise the answering
	 * thread's.
	 */
	_Atomic bool works;
	bool stop;
	/* What the sweeper writes from `memory`, and what it then reads to it. */
	struct uffd_sweep_step written, read;
	bool mine[UFFD_SWEEP_PAGES];
	bool is_good;
	int error;
	uint64_t changes; /* of the layout, when it was told */
	uint64_t from;
	/* What is saved and may still be protected: from the one to the other. */
	uint64_t lifted, saved;
};

int uffd_sweep_start(struct uffd_sweep *sweep, struct uffd_saving *saving, int fd, uint64_t rate);
/*
 * Take what the sweeper has read, and tell it its next step; nothing is owed before
 * `began_ns` is set.  `answer(argument)` answers messages, and returns whether there were
 * any.  Returns 1 if the sweeper was told something, else 0, or -errno.
 */
int uffd_sweep_go_on(struct uffd_sweep *sweep, bool (*answer)(void *), void *argument);
/* Whether it has nothing to do now, but will have later. */
bool uffd_sweep_is_late(const struct uffd_sweep *sweep);
void uffd_sweep_stop(struct uffd_sweep *sweep);

#endif /* UFFD_SNAPSHOT_SWEEPING_H */
