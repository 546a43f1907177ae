/* SPDX-License-Identifier: MIT */
/* Address spaces: a userfaultfd, and the ranges served through it. */
#ifndef UFFD_ENGINE_SPACE_H
#define UFFD_ENGINE_SPACE_H

#include "core.h"

#define NEXT_NUMBER	UINT32_MAX

/* `owner_pid` 0: unknown.  -ESRCH: that process has exited, but its memory lives on. */
int space_create(struct uffd_engine *engine, int fd, bool owned, uint32_t layout_events,
		 int32_t owner_pid, uint32_t number, struct uffd_space **ret);
struct uffd_space *space_get(struct uffd_engine *engine, uint32_t number);
void space_put(struct uffd_space *space);
void space_retire(struct uffd_space *space);
bool space_is_dead(struct uffd_space *space);
/* SIGKILL the process that owns the memory; for a fork, the faulting thread's process. */
int space_kill(struct uffd_space *space, uint32_t thread_id, uint64_t address);
/* Whether a thread of the owner is changing the layout and waits for its event to be read. */
bool layout_is_changing(struct uffd_space *space);
/*
 * Inside the gate: whether nothing was moved or unmapped since `moves` was the space's, so that
 * an address still refers to the same memory.  Without layout events this is unknown.
 */
bool layout_is_as(struct uffd_space *space, uint64_t moves);
/* Wait, up to the retry limit, until none is. */
void wait_for_layout(struct uffd_space *space);

/* The memory is gone: note a failure if content was still to be saved. */
void note_unsaved(struct uffd_range *range);
/* Free ranges that were taken out while in use; returns whether none is left. */
bool free_lost(struct uffd_engine *engine);

int watch_space(struct uffd_engine *engine, struct uffd_space *space);

#endif /* UFFD_ENGINE_SPACE_H */
