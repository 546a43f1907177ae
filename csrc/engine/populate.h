/* SPDX-License-Identifier: MIT */
/* Filling absent pages now. */
#ifndef UFFD_ENGINE_POPULATE_H
#define UFFD_ENGINE_POPULATE_H

#include "core.h"

struct uffd_populate_result {
	uint64_t filled;	/* bytes */
	uint64_t failed_at;	/* the first page whose worker has no content; 0: none */
};

/*
 * Fill absent pages now; returns the first error.  Workers are asked for `chunk` bytes
 * at a time, whole pages; 0: for as many as they are quick with.  What fails stays absent.
 */
int uffd_engine_populate(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, uint64_t chunk,
			 struct uffd_populate_result *result_ret);

#endif /* UFFD_ENGINE_POPULATE_H */
