/* SPDX-License-Identifier: MIT */
/*
 * One round of dirty tracking: which pages of many mappings were written since
 * they were protected, and protecting them again.
 *
 * The mappings are registered with a userfaultfd that has WP_ASYNC.  Nothing
 * here touches the memory.
 */
#ifndef UFFD_DIRTY_ROUND_H
#define UFFD_DIRTY_ROUND_H

#include <stdint.h>

#include "uffd_pagemap.h"

/* How a mapping is tracked. */
enum uffd_track {
	/* Every page has been protected, holes too: what is not protected was written or dropped. */
	UFFD_TRACK_DENSE,
	/* Only populated pages are protected. A page dropped is a hole that was not one before. */
	UFFD_TRACK_SPARSE,
	/* Hugetlb: protected by WRITEPROTECT, never by the scan (Linux 6.7 and later can deadlock). */
	UFFD_TRACK_HUGE,
};

/* The content of a page without an entry in the page table. */
enum uffd_backing {
	UFFD_BACKING_FILE, /* what its file holds */
	UFFD_BACKING_ZERO, /* zeros: private anonymous memory */
	/*
	 * What its file holds, but a page that was written here is a private copy. Dropping the copy
	 * (MADV_DONTNEED) keeps the protection, so it is not reported as written.
	 */
	UFFD_BACKING_COPIED,
};

/* Ask for holes apart: the one scan for all does not report them on this kernel. */
#define UFFD_ROUND_HOLES_APART	(1u << 0)
/* Report only; protect nothing. */
#define UFFD_ROUND_PEEK		(1u << 1)

struct uffd_tracked {
	uint64_t start;
	uint64_t end;
	uint64_t track;
	uint64_t backing;
	/* The userfaultfd that it is registered with. */
	uint64_t uffd;
	/* Set by uffd_round(): 0, or the errno that ended the scan of this mapping. */
	uint64_t error;
	/* Kept by uffd_round(): how many ranges a scan is likely to find; 0 at first. */
	uint64_t found;
};

/*
 * Scan all mappings, which are in ascending order.  An error of one mapping does not end the
 * round; returns 0, or -errno for a lack of memory or a process that is gone.
 *
 * written_ret: pages written. dropped_ret: pages that read as zeros now. known_ret: what the next
 * round compares with: the holes of sparse mappings, and private copies of a file's pages; `known`
 * is that of the round before.
 */
int uffd_round(int pagemap_fd, struct uffd_tracked *tracked, uint64_t count, uint32_t flags,
	       const struct uffd_page_region *known, uint64_t known_count,
	       struct uffd_page_ranges *written_ret, struct uffd_page_ranges *dropped_ret,
	       struct uffd_page_ranges *known_ret);

/* Protect ranges one by one; -errno of the first that fails, the others are protected. */
int uffd_round_protect(int uffd, const struct uffd_page_region *vec, uint64_t count);

/* Bytes of a mapping that are populated: present or on swap. */
int uffd_round_populated(int pagemap_fd, uint64_t start, uint64_t end, uint64_t *bytes_ret);

#endif /* UFFD_DIRTY_ROUND_H */
