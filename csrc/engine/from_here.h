/* SPDX-License-Identifier: MIT */
/* Fill absent pages whose content is here, as work on slices. */
#ifndef UFFD_ENGINE_FROM_HERE_H
#define UFFD_ENGINE_FROM_HERE_H

#include "core.h"
#include "slices.h"

/* Ranges that are close to each other, in ascending order; their offsets are from `base`. */
struct near_ranges {
	uint64_t base;
	const uint64_t *words;
	uint64_t width, count;
};

/* A slice_work: the pages that are absent. */
uint64_t fill_slice(const struct slices *all, struct uffd_range *range, uint64_t at, uint64_t end,
		    int *error_ret, uint64_t *done_ret);
/* The same for those of a `struct near_ranges`, the context; their source is a file. */
uint64_t fill_group(const struct slices *all, struct uffd_range *range, uint64_t at, uint64_t end,
		    int *error_ret, uint64_t *done_ret);

#endif /* UFFD_ENGINE_FROM_HERE_H */
