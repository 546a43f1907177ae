/* SPDX-License-Identifier: MIT */
/* Requests that nobody answers. */
#ifndef UFFD_ENGINE_STALL_H
#define UFFD_ENGINE_STALL_H

#include "core.h"

/*
 * Poison the pages that wait for a worker, of one serving or (id 0) of all; with an
 * error other than 0 that is a failure, which is noted.
 */
void uffd_engine_abandon(struct uffd_engine *engine, uint64_t id, int32_t error);
/* Workers that have not come back with a page that was abandoned. */
uint32_t uffd_engine_hung(struct uffd_engine *engine);
/* Apply on_error to requests that are older; returns when the next one will be. */
uint64_t fail_stalled_requests(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_STALL_H */
