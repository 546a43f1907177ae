/* SPDX-License-Identifier: MIT */
/* Requests without an answer. */
#ifndef UFFD_ENGINE_STALL_H
#define UFFD_ENGINE_STALL_H

#include "core.h"

/*
 * Poison the pages that wait for a worker, of one range or (id 0) of all; with an error
 * other than 0 note that as a failure.
 */
void uffd_engine_abandon(struct uffd_engine *engine, uint64_t id, int32_t error);
/* The same for pages [offset, offset + length) of one range. */
void uffd_engine_abandon_part(struct uffd_engine *engine, uint64_t id, uint64_t offset,
			      uint64_t length);
/* The number of workers that still fetch an abandoned page. */
uint32_t uffd_engine_hung(struct uffd_engine *engine);
/* Apply on_error to requests older than the limit; returns when the next one will be. */
uint64_t fail_stalled_requests(struct uffd_engine *engine);
/*
 * Before a fault of this thread is resolved: if the thread runs a source that would have to
 * fetch the page, it waits for itself.  Apply on_error to what the source was asked for.
 */
void end_own_wait(struct uffd_range *range, uint64_t page, uint32_t thread_id);

#endif /* UFFD_ENGINE_STALL_H */
