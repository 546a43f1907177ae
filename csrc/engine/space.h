/* SPDX-License-Identifier: MIT */
/* Address spaces: a userfaultfd, and what is served through it. */
#ifndef UFFD_ENGINE_SPACE_H
#define UFFD_ENGINE_SPACE_H

#include "core.h"

#define NEXT_NUMBER	UINT32_MAX

/* `owner_pid`: 0: unknown.  -ESRCH: that process has exited, and its memory lives on. */
int space_create(struct uffd_engine *engine, int fd, bool owned, uint32_t layout_events,
		 int32_t owner_pid, uint32_t number, struct uffd_space **ret);
struct uffd_space *space_get(struct uffd_engine *engine, uint32_t number);
void space_put(struct uffd_space *space);
void space_retire(struct uffd_space *space);
bool space_is_dead(struct uffd_space *space);
/* SIGKILL for the process whose memory it is; of a fork, for that of the faulting thread. */
int space_kill(struct uffd_space *space, uint32_t thread_id, uint64_t address);
/* Whether a thread of the owner is changing the layout, and waits for its event to be read. */
bool layout_is_changing(struct uffd_space *space);
/* Wait, for a while, until none is. */
void wait_for_layout(struct uffd_space *space);

/* The memory is gone: what of it was still to be saved cannot be. */
void note_unsaved(struct uffd_range *range);
/* Free what was taken out while somebody was at it; returns whether none is left. */
bool free_lost(struct uffd_engine *engine);

int watch_space(struct uffd_engine *engine, struct uffd_space *space);

#endif /* UFFD_ENGINE_SPACE_H */
