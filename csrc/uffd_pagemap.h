/* SPDX-License-Identifier: MIT */
/*
 * Read /proc/PID/pagemap and use its PAGEMAP_SCAN ioctl.
 *
 * Nothing here touches the memory it looks at, so nothing can fault there.
 * Every function returns 0 or -errno; outputs come last.
 */
#ifndef UFFD_PAGEMAP_H
#define UFFD_PAGEMAP_H

#include <stdint.h>

#include "uffd_abi.h"

/* A growing array of ranges; all zero is empty and valid. */
struct uffd_page_ranges {
	struct uffd_page_region *vec;
	uint64_t count;
	uint64_t capacity;
};

/* Where a page of a mapping is; the values are PageResidency's in Python. */
enum uffd_residency {
	UFFD_RESIDENCY_HOLE,
	UFFD_RESIDENCY_SWAPPED,
	UFFD_RESIDENCY_RESIDENT,
	UFFD_RESIDENCY_MAPPED,
	UFFD_RESIDENCY_PRIVATE,
	UFFD_RESIDENCY_POISON,
	UFFD_RESIDENCY_UNKNOWN,
};

/* Facts about a mapping, for uffd_pagemap_residency(). */
#define UFFD_MAPPING_SHARED	(1u << 0) /* MAP_SHARED: its PTEs never hold swap entries */
#define UFFD_MAPPING_FILE	(1u << 1) /* backed by a page cache (file, shmem, hugetlb) */
#define UFFD_MAPPING_MINCORE	(1u << 2) /* mincore(2) is reliable on it */
#define UFFD_MAPPING_SEEK	(1u << 3) /* SEEK_DATA and SEEK_HOLE are reliable on file_fd */

void uffd_pagemap_free(void *memory);

/* -ESRCH once the address space behind @fd is gone (exit or execve). */
int uffd_pagemap_alive(int fd);

/*
 * Read the entries of @pages pages of 4 KiB from @start. -ESRCH as above; -EFAULT if the range
 * leaves the address space. @pages_ret: how many entries are valid, also after an error.
 */
int uffd_pagemap_read(int fd, uint64_t start, uint64_t pages, uint64_t *entries,
		      uint64_t *pages_ret);

/* Count the entries with (entry & mask) == value. */
int uffd_pagemap_count(const uint64_t *entries, uint64_t pages, uint64_t mask, uint64_t value,
		       uint64_t *count_ret);

/* Append the runs of entries with (entry & mask) == value; categories are 0. */
int uffd_pagemap_runs(const uint64_t *entries, uint64_t pages, uint64_t start, uint64_t mask,
		      uint64_t value, struct uffd_page_ranges *ranges_ret);

/* The same for one byte per page of @page_size bytes. */
int uffd_pagemap_state_runs(const uint8_t *states, uint64_t pages, uint64_t start,
			    uint64_t page_size, uint8_t state, struct uffd_page_ranges *ranges_ret);

/* Sum of the sizes of ranges. */
int uffd_pagemap_bytes(const struct uffd_page_region *vec, uint64_t count, uint64_t *bytes_ret);

/* One PAGEMAP_SCAN ioctl; @count_ret: its result, the number of filled regions. */
int uffd_pagemap_scan(int fd, struct uffd_pm_scan_arg *arg, uint64_t *count_ret);

/*
 * PAGEMAP_SCAN until [request->start, request->end) is walked, or request->vec_len ranges are
 * found (UINT64_MAX: no limit; 0: none are wanted), or request->max_pages pages (0: no limit).
 * Adjacent ranges of equal categories are joined. request->vec is ignored.
 * On an error @ranges_ret has the ranges found before it, up to @walk_end_ret. -ENOSPC: the first
 * match is a hugetlb page larger than max_pages, which cannot be protected in part.
 */
int uffd_pagemap_scan_all(int fd, const struct uffd_pm_scan_arg *request,
			  struct uffd_page_ranges *ranges_ret, uint64_t *walk_end_ret);

/*
 * The same into an array that was used before, which is emptied first and stays as large as it is.
 * With at most @expected ranges it is one ioctl.
 */
int uffd_pagemap_scan_again(int fd, const struct uffd_pm_scan_arg *request, uint64_t expected,
			    struct uffd_page_ranges *ranges);

/*
 * Write one enum uffd_residency per page of @page_size bytes, for a range inside one mapping of
 * this process, which maps @file_fd (-1: no file) from @offset on. Moves file_fd's position.
 */
int uffd_pagemap_residency(int pagemap_fd, uint64_t start, uint64_t length, uint64_t page_size,
			   int file_fd, uint64_t offset, uint32_t mapping, uint8_t *states_ret);

#endif /* UFFD_PAGEMAP_H */
