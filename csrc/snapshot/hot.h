/* SPDX-License-Identifier: MIT */
/* A working set as ranges of the memory that is restored, and reading their files ahead. */
#ifndef UFFD_SNAPSHOT_HOT_H
#define UFFD_SNAPSHOT_HOT_H

#include <stdint.h>

#include "uffd_pagemap.h"

/* A part of some memory that is a part of the image, in bytes. */
struct uffd_hot_place {
	uint64_t offset;	/* in the image */
	uint64_t length;
	uint64_t memory;	/* a number */
	uint64_t at;		/* in the memory */
	uint64_t page_size;	/* of the memory */
};

/* The file's rows, docs/snapshots.md: page, pages, seen, tried. */
#define UFFD_HOT_ROW_SIZE	16u

struct uffd_hot_plan {
	/* Rows (begin, end, memory): bytes of the memory, in whole pages. */
	struct uffd_page_ranges ranges;
	/* Rows (first, past, memory) of ranges, which are in one memory: what is filled at once. */
	struct uffd_page_ranges windows;
	uint64_t bytes;		/* in all ranges */
};

/*
 * Check that rows can be those of an image of this size after this many recordings: no page is
 * outside of it or in two rows, and all have at most `most_pages`.  0 or -EINVAL; -ENOMEM.
 */
int uffd_hot_check(const void *rows, uint64_t count, uint64_t image_pages, uint32_t recordings,
		   uint64_t most_pages);

/*
 * Turn rows that at least `percent` of the recordings touched into ranges of memory, in their
 * order but for this: of each `window` bytes the ranges of one memory are put together.  The rows
 * are not trusted: what is outside of the places is left out.  `places` is in the order of
 * offsets, without overlaps.  What was found is freed by uffd_hot_plan_free(), also
 * on failure.
 */
int uffd_hot_plan(const void *rows, uint64_t count, uint32_t percent,
		  const struct uffd_hot_place *places, uint64_t places_count, uint64_t window,
		  struct uffd_hot_plan *ret);
void uffd_hot_plan_free(struct uffd_hot_plan *plan);

/*
 * Ask the kernel to read the files of some ranges (begin, end, not used) of one memory.  `runs`
 * are those of its struct uffd_chain, up to `length`; `fds` has the file of leaf n + 1 at n.
 * Neighbours in a file become one request.  It is a hint: errors of files are left out.  -ENOMEM.
 */
int uffd_hot_read_ahead(const struct uffd_page_region *ranges, uint64_t count,
			const struct uffd_page_region *runs, uint64_t runs_count, uint64_t length,
			const int32_t *fds, uint64_t fds_count);

#endif /* UFFD_SNAPSHOT_HOT_H */
