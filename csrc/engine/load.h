/* SPDX-License-Identifier: MIT */
/* Fill all that has content, so that a range can be taken out without a loss. */
#ifndef UFFD_ENGINE_LOAD_H
#define UFFD_ENGINE_LOAD_H

#include "populate.h"

/*
 * As uffd_engine_populate(), in the range's space and in forks.  Pages that are zeros by
 * what their source is are left to their faults, and unmapped memory is skipped.
 * -ESRCH: the process is gone, and so are the forks that had such memory.
 */
int uffd_engine_load(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, uint64_t chunk,
		     struct uffd_populate_result *result_ret);

#endif /* UFFD_ENGINE_LOAD_H */
