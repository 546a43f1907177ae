/* SPDX-License-Identifier: MIT */
/* The address spaces of an engine: more of them, fewer, and all of them woken. */
#ifndef UFFD_ENGINE_SPACES_H
#define UFFD_ENGINE_SPACES_H

#include "core.h"

/*
 * Serve another userfaultfd as well; borrowed.  Space 0 is the engine's own.
 * `owner_pid`: whose memory it governs, 0 if that is unknown.
 */
int uffd_engine_add_space(struct uffd_engine *engine, int fd, uint32_t layout_events,
			  int32_t owner_pid, uint32_t *space_ret);
/*
 * Forget a descriptor whose ranges have been taken out, before it is closed.
 * -EBUSY: a thread that a source holds up may still use it.
 */
int uffd_engine_remove_space(struct uffd_engine *engine, uint32_t space, uint64_t limit_ns);
/* Let everybody who waits ask again: what a dead process had read is lost. */
void uffd_engine_wake_all(struct uffd_engine *engine);
/*
 * The same where a fault has been read: whoever read it may have died.  Those that nobody
 * has read are left alone, since a thread that is woken waits no more until it runs.
 */
void uffd_engine_wake_read(struct uffd_engine *engine);
uint32_t uffd_engine_spaces(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_SPACES_H */
