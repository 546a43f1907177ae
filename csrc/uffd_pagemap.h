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

/* Free an array of ranges, which is empty then; may be called again. */
void uffd_pagemap_release(struct uffd_page_ranges *ranges);

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
 * Which is the first of @count spans (start, length) that has a page of one of these categories;
 * @index_ret: @count if none has.
 */
int uffd_pagemap_first_of(int fd, const uint64_t *spans, uint64_t count, uint64_t anyof,
			  uint64_t *index_ret);

/*
 * The same into an array that was used before, which is emptied first and stays as large as it is.
 * With at most @expected ranges it is one ioctl.
 */
int uffd_pagemap_scan_again(int fd, const struct uffd_pm_scan_arg *request, uint64_t expected,
			    struct uffd_page_ranges *ranges);

#endif /* UFFD_PAGEMAP_H */
