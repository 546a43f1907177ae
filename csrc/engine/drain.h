/* SPDX-License-Identifier: MIT */
/* Waiting for the faults that wait at one instant, however many come later. */
#ifndef UFFD_ENGINE_DRAIN_H
#define UFFD_ENGINE_DRAIN_H

#include "core.h"

/*
 * Wait until every fault that was waiting at the call is resolved, or its page given up;
 * -ETIMEDOUT.
 */
int uffd_native_drain(struct uffd_engine *engine, uint64_t limit_ns);

/* For the leader: a step is done, and all that was queued before it has been read. */
void note_pass(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_DRAIN_H */
