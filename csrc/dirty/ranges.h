/* SPDX-License-Identifier: MIT */
/*
 * Sets of pages as packed ranges: sorted, not overlapping, [start, end).
 *
 * Every function appends its result to an array that the caller frees with
 * uffd_pagemap_release(), also after an error.
 */
#ifndef UFFD_DIRTY_RANGES_H
#define UFFD_DIRTY_RANGES_H

#include <stdint.h>

#include "uffd_pagemap.h"

/* Append a range behind all others; one that is adjacent is joined with the last. */
int uffd_ranges_append(struct uffd_page_ranges *ranges, uint64_t start, uint64_t end);

/* Append a row as it is. */
int uffd_ranges_append_row(struct uffd_page_ranges *ranges, uint64_t start, uint64_t end,
			   uint64_t categories);

/* Pages in either set. */
int uffd_ranges_union(const struct uffd_page_region *a, uint64_t a_count,
		      const struct uffd_page_region *b, uint64_t b_count,
		      struct uffd_page_ranges *ranges_ret);

/* Pages of `a` that are not in `b`. */
int uffd_ranges_subtract(const struct uffd_page_region *a, uint64_t a_count,
			 const struct uffd_page_region *b, uint64_t b_count,
			 struct uffd_page_ranges *ranges_ret);

/* Pages in both sets. */
int uffd_ranges_intersect(const struct uffd_page_region *a, uint64_t a_count,
			  const struct uffd_page_region *b, uint64_t b_count,
			  struct uffd_page_ranges *ranges_ret);

/* How many bytes of each of the spans, which are sorted and do not overlap, are in a set. */
int uffd_ranges_bytes_in(const struct uffd_page_region *a, uint64_t a_count,
			 const struct uffd_page_region *spans, uint64_t spans_count,
			 uint64_t *bytes_ret);

#endif /* UFFD_DIRTY_RANGES_H */
