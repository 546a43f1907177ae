/* SPDX-License-Identifier: MIT */
/* Hand the content of pages over before they are evicted. */
#ifndef UFFD_ENGINE_WRITE_BACK_H
#define UFFD_ENGINE_WRITE_BACK_H

#include "core.h"

/*
 * Copy the content of [offset, offset + length) to memory of this process, missing pages
 * excepted: -EFAULT, and those that may not be read (mprotect(2)): -EACCES.
 */
int uffd_engine_peek(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, void *target);

/*
 * Evict all pages that are there, which are protected, and written to a file first, in
 * which offset 0 is at `begin`: all, or those that were written since they were protected.  A page
 * that is written meanwhile is written to the file again, a few times, and stays if it is
 * written still.  Whatever is not in the file at an error is called written again.
 */
int uffd_engine_evict_to(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, int32_t fd, uint64_t begin,
			 uint32_t written_only, uint64_t *evicted_ret, uint64_t *reached_ret);

#endif /* UFFD_ENGINE_WRITE_BACK_H */
