/* SPDX-License-Identifier: MIT */
/* Drop pages of this process, so that their source is asked again. */
#ifndef UFFD_ENGINE_EVICT_H
#define UFFD_ENGINE_EVICT_H

#include "core.h"

/*
 * Copy the content of [offset, offset + length) to memory of this process, missing pages
 * excepted: -EFAULT.
 */
int uffd_engine_peek(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, void *target);

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

/*
 * The same for all pages that are there, which are protected, and written to a file at
 * their offsets first: all, or those that were written since they were protected.  A page
 * that is written meanwhile is written to the file again, a few times, and stays if it is
 * written still.  Whatever is not in the file at an error is called written again.
 */
int uffd_engine_evict_to(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, int32_t fd, uint32_t written_only,
			 uint64_t *evicted_ret, uint64_t *reached_ret);

#endif /* UFFD_ENGINE_EVICT_H */
