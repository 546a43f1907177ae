/* SPDX-License-Identifier: MIT */
/*
 * Another process's memory in a file: each address has its place, and pages of zeros are holes.
 */
#ifndef UFFD_SNAPSHOT_IMAGE_H
#define UFFD_SNAPSHOT_IMAGE_H

#include <stdint.h>

#include "uffd_pagemap.h"

/* Where the bytes of [start, end) are in the file.  Pieces are sorted and do not overlap. */
struct uffd_image_piece {
	uint64_t start;
	uint64_t end;
	uint64_t offset;
};

/* What counts as content of a piece, see uffd_image_scan(). */
#define UFFD_IMAGE_OWN		0u /* pages of the process alone: anonymous, or copied on write */
#define UFFD_IMAGE_ALL		1u /* those of the file too */

/* The file may hold something at these places: write zeros too. */
#define UFFD_IMAGE_OVERWRITE	(1u << 0)
/* As above, and they may hold the same: read them, and write only the pages that differ. */
#define UFFD_IMAGE_IF_CHANGED	(1u << 3)
/* For uffd_image_copy(): other threads of the machine get the CPU first. */
#define UFFD_IMAGE_GENTLE	(1u << 2)

/* For uffd_image_scan(): only pages without write-protection. */
#define UFFD_IMAGE_UNPROTECTED	(1u << 1)

/*
 * Copy ranges to the file.  Memory without PROT_READ is read through `mem_fd`, an open
 * /proc/PID/mem, unless that is negative.
 *
 * zero_ret: pages of zeros, not written unless flags have UFFD_IMAGE_OVERWRITE or _IF_CHANGED.  lost_ret: pages
 * that cannot be read; their place is treated as zeros.  done_ret: bytes done, from the beginning,
 * also after an error.  -EINVAL: a range outside of the pieces.
 */
int uffd_image_copy(int32_t pid, int mem_fd, const struct uffd_page_region *vec, uint64_t count,
		    const struct uffd_image_piece *pieces, uint64_t pieces_count, int fd,
		    uint32_t flags, struct uffd_page_ranges *zero_ret,
		    struct uffd_page_ranges *lost_ret, uint64_t *done_ret);

/*
 * Have the kernel write new content of the file to the disk.  Errors are those of a later fsync(2).
 */
void uffd_image_begin_sync(int fd);

/*
 * Write ranges whose content is in memory already, packed in `data`: as above, without losses.
 */
int uffd_image_write(const struct uffd_page_region *vec, uint64_t count, const void *data,
		     const struct uffd_image_piece *pieces, uint64_t pieces_count, int fd,
		     uint32_t flags, struct uffd_page_ranges *zero_ret);

/* Ranges of pages, in ascending order. */
struct uffd_image_ranges {
	const struct uffd_page_region *vec;
	uint64_t count;
};

/*
 * The content of pieces that is in memory or on swap.  `what`: UFFD_IMAGE_OWN or _ALL for each; the
 * latter is faster, as the kernel need not look at the page.
 *
 * within: look there only, and perhaps between ranges that are close to each other; NULL: everywhere.
 * swapped_ret: those on swap; markers of write-protection count as that.
 */
int uffd_image_scan(int pagemap_fd, const struct uffd_image_piece *pieces, const uint32_t *what,
		    uint64_t count, uint32_t flags, const struct uffd_image_ranges *within,
		    struct uffd_page_ranges *ranges_ret, struct uffd_page_ranges *swapped_ret);

/*
 * Compare pages of two buffers; append those that differ, as ranges from `start`.
 */
int uffd_image_differ(const void *a, const void *b, uint64_t length, uint64_t start,
		      struct uffd_page_ranges *ranges_ret);

#endif /* UFFD_SNAPSHOT_IMAGE_H */
