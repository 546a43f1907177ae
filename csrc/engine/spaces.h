/* SPDX-License-Identifier: MIT */
/* Add, remove and wake address spaces of an engine. */
#ifndef UFFD_ENGINE_SPACES_H
#define UFFD_ENGINE_SPACES_H

#include "core.h"

/* Create a space and watch it; `number`: as for space_create(). */
int space_add(struct uffd_engine *engine, int fd, bool owned, uint32_t layout_events,
	      int32_t owner_pid, uint32_t number, uint32_t *number_ret);
/*
 * Serve another userfaultfd as well; borrowed.  Space 0 is the engine's own.
 * `owner_pid`: the process it governs; 0: unknown.
 */
int uffd_engine_add_space(struct uffd_engine *engine, int fd, uint32_t layout_events,
			  int32_t owner_pid, uint32_t *space_ret);
/*
 * Remove a descriptor whose ranges have been taken out, before it is closed.
 * -EBUSY: a thread that a source blocks may still use it.
 */
int uffd_engine_remove_space(struct uffd_engine *engine, uint32_t space, uint64_t limit_ns);
/* Make all waiting threads fault again: messages that a dead process had read are lost. */
void uffd_engine_wake_all(struct uffd_engine *engine);
/*
 * The same, only in spaces where a waiting thread's fault has been read: its reader may
 * have died.  Others keep waiting: a woken thread counts as not waiting until it runs.
 */
void uffd_engine_wake_read(struct uffd_engine *engine);
/* List the numbers of all forks in `forks_ret`, which the caller frees; -ENOMEM. */
int list_forks(struct uffd_engine *engine, uint32_t **forks_ret, size_t *count_ret);
uint32_t uffd_engine_spaces(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_SPACES_H */
