/* SPDX-License-Identifier: MIT */
/*
 * Reports to the keeper: another process that outlives this one if it is killed.
 *
 * It holds copies of the descriptors that only we have (forks), knows where every
 * piece of memory is by now, and can start a successor that goes on from there.
 * The pages' states lie in files that both have, and so does what was read from the
 * descriptors and not applied.
 *
 * A fork's descriptor comes into being in the process that reads the event.  So that
 * it outlives that process from the first instant, a third one, the holder, shares
 * the worker's table of descriptors and does nothing else.
 */
#ifndef UFFD_ENGINE_SUCCESSOR_H
#define UFFD_ENGINE_SUCCESSOR_H

#include "core.h"

uint64_t uffd_engine_shared_size(void);

/* Go on with a space of another engine, under its number; a fork's fd is ours from now on. */
int uffd_engine_adopt_space(struct uffd_engine *engine, int fd, uint32_t is_fork,
			    uint32_t layout_events, int32_t owner_pid, uint32_t space);
/* An UNMAP of [start, end) in a space of another engine is still to come. */
int uffd_engine_expect_unmap(struct uffd_engine *engine, uint32_t space, uint64_t start,
			     uint64_t end);
/* Before the start: apply what another engine had read and not applied. */
void uffd_engine_replay(struct uffd_engine *engine, uint64_t reported);

/* For the keeper's child: be killed when the keeper ends; -ESRCH: it has. */
int uffd_keeper_follow_parent(int32_t parent);

/*
 * For the keeper's child, before anything else: make the holder, a child of the
 * keeper, and note it in what outlives us.  It shuts the sockets when we end.
 */
int uffd_keeper_hold_descriptors(void *shared, int32_t keeper, const int32_t *sockets,
				 uint32_t count);
/*
 * For the keeper, when its child has been killed: take over the descriptor of the
 * next fork that was read and not applied.  Returns it and moves `position` behind
 * it; -ENOENT: there is none; else it cannot be had.
 */
int uffd_keeper_rescue_fork(void *shared, uint32_t *position);
/* End the holder. */
void uffd_keeper_release_holder(void *shared);

#endif /* UFFD_ENGINE_SUCCESSOR_H */
