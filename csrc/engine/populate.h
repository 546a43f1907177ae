/* SPDX-License-Identifier: MIT */
/* Fill absent pages now. */
#ifndef UFFD_ENGINE_POPULATE_H
#define UFFD_ENGINE_POPULATE_H

#include "core.h"

struct uffd_populate_result {
	uint64_t filled;	/* bytes */
	uint64_t failed_at;	/* the first page that could not be filled; 0: not known */
};

/*
 * Fill absent pages now; returns the first error.  Request `chunk` bytes at a time from
 * workers, whole pages; 0: adapt to how quickly they answer.  Pages that fail stay absent.
 */
int uffd_engine_populate(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, uint64_t chunk,
			 struct uffd_populate_result *result_ret);
/*
 * The same for some ranges of [offset, offset + length): `width` words each, of which the
 * first two are where it begins and ends, counted from `offset`.  -EINVAL: one is no range
 * of whole pages in there; nothing is done.
 */
int uffd_engine_populate_ranges(struct uffd_engine *engine, const struct uffd_range_ref *ref,
				uint64_t offset, uint64_t length, const uint64_t *words,
				uint64_t width, uint64_t count, uint64_t chunk,
				struct uffd_populate_result *result_ret);

#endif /* UFFD_ENGINE_POPULATE_H */
