/* SPDX-License-Identifier: MIT */
/* Drop pages of this process, so that their source is asked again. */
#ifndef UFFD_ENGINE_EVICT_H
#define UFFD_ENGINE_EVICT_H

#include "core.h"

/*
 * Drop the pages of [offset, offset + length) for which `wanted` has a byte other than 0,
 * and call them absent.  Pages that were written since they were protected stay, unless
 * `written_too`; so does what is not there.  -EINVAL: memory that is locked; -EACCES: shared
 * memory that cannot be written.  `evicted_ret`: bytes; `reached_ret`: the offset where it
 * stopped.
 */
int uffd_engine_evict(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		      uint64_t offset, uint64_t length, const uint8_t *wanted,
		      uint32_t written_too, uint64_t *evicted_ret, uint64_t *reached_ret);

#endif /* UFFD_ENGINE_EVICT_H */
