/* SPDX-License-Identifier: MIT */
/* One step of the leader: read, apply, resolve. */
#ifndef UFFD_ENGINE_STEP_H
#define UFFD_ENGINE_STEP_H

#include "core.h"

/* Read everything that is queued and resolve it; `handled_ret` counts the messages. */
void uffd_engine_step(struct uffd_engine *engine, uint32_t *handled_ret);
/* Retry the deferred faults. */
void retry_deferred(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_STEP_H */
