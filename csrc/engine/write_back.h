/* SPDX-License-Identifier: MIT */
/* Hand the content of pages over before they are evicted. */
#ifndef UFFD_ENGINE_WRITE_BACK_H
#define UFFD_ENGINE_WRITE_BACK_H

#include "core.h"

/*
 * Copy the content of [offset, offset + length) to memory of this process.  -EFAULT: a page
 * is missing; -EACCES: a page may not be read (mprotect(2)).
 */
int uffd_engine_peek(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, void *target);

/*
 * Evict all pages that are there.  First they are protected, and written to a file in which
 * offset 0 is at `begin`: all of them, or those that were written since they were
 * protected.  A page whose owner writes to it meanwhile is written to the file again, a few
 * times; if the owner still writes, the page stays.  On an error, pages whose content is
 * not in the file count as written again.
 */
int uffd_engine_evict_to(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, int32_t fd, uint64_t begin,
			 uint32_t written_only, uint64_t *evicted_ret, uint64_t *reached_ret);

#endif /* UFFD_ENGINE_WRITE_BACK_H */
