/* SPDX-License-Identifier: MIT */
/*
 * Continue the work of a killed process, with the help of the keeper, which outlives it.
 *
 * The keeper has copies of the descriptors that only the worker has (forks), knows the
 * address of every piece, and can start a successor that continues from there.  The
 * pages' states, and messages that were read but not applied, are in files that both
 * have.
 *
 * A fork's descriptor is created in the process that reads the event.  To keep it open
 * from the first instant if that process is killed, a third one, the holder, shares the
 * worker's descriptor table and does nothing else.
 */
#ifndef UFFD_ENGINE_SUCCESSOR_H
#define UFFD_ENGINE_SUCCESSOR_H

#include "core.h"

/* The bytes of `options.shared`, with a log of this many faults. */
uint64_t uffd_engine_shared_size(uint64_t fault_log);

/* Continue a space of another engine under its number; takes ownership of a fork's fd. */
int uffd_engine_adopt_space(struct uffd_engine *engine, int fd, uint32_t is_fork,
			    uint32_t layout_events, int32_t owner_pid, uint32_t space);
/* An UNMAP of [start, end) in a space of another engine is still to come. */
int uffd_engine_expect_unmap(struct uffd_engine *engine, uint32_t space, uint64_t start,
			     uint64_t end);
/* Before the start: apply events that another engine had read but not applied. */
void uffd_engine_replay(struct uffd_engine *engine, uint64_t reported);

/* For the keeper's child: get SIGKILL when the keeper ends; -ESRCH: it has ended. */
int uffd_keeper_follow_parent(int32_t parent);

/*
 * For the keeper's child, before anything else: create the holder, a child of the
 * keeper, and note its pid in `shared`.  It shuts the sockets down when this process
 * ends.
 */
int uffd_keeper_hold_descriptors(void *shared, int32_t keeper, const int32_t *sockets,
				 uint32_t count);
/*
 * For the keeper, when its child was killed: take over the descriptor of the next fork
 * whose event was read but not applied, and move `position` behind it.  Returns the
 * descriptor; -ENOENT: there are no more; another error: it could not be taken.
 */
int uffd_keeper_rescue_fork(void *shared, uint32_t *position);
/* End the holder. */
void uffd_keeper_release_holder(void *shared);

#endif /* UFFD_ENGINE_SUCCESSOR_H */
