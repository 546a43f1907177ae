/* SPDX-License-Identifier: MIT */
/* Save old content of protected pages to the buffer that `preserve` names. */
#ifndef UFFD_ENGINE_SAVE_H
#define UFFD_ENGINE_SAVE_H

#include "core.h"
#include "slices.h"

/* Save a claimed page that is still protected.  -EFAULT, -EPERM, ...: it is not saved. */
int save_page(struct uffd_range *range, uint64_t page);
uint64_t preserve_slice(const struct slices *all, struct uffd_range *range, uint64_t at,
			uint64_t end, int *error_ret, uint64_t *done_ret);
uint64_t preserve_reach(const struct slices *all, struct uffd_range *range, uint64_t at,
			uint64_t end, struct reach *reach);

/*
 * Save protected pages now, in this thread.  They stay protected, so that a later write
 * shows, unless `unprotect` is set.  `reached_ret`: the offset of the page that could
 * not be saved.
 */
int uffd_engine_preserve(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, uint32_t unprotect,
			 uint64_t *saved_ret, uint64_t *reached_ret);

#endif /* UFFD_ENGINE_SAVE_H */
