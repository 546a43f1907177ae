// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/page.h"
#include "dirty/ranges.h"
#include "snapshot/pages.h"

#define FIRST_CAPACITY 1024u

int uffd_pages_protected(int pagemap_fd, uint64_t start, uint64_t pages, uint64_t *pages_ret)
{
	struct uffd_page_region found[UFFD_PAGES_MOST];
	struct uffd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = start,
		.end = start + pages * BASE_PAGE,
		.vec = (uintptr_t)found,
		.vec_len = UFFD_PAGES_MOST,
		.category_mask = UFFD_PAGE_IS_WRITTEN,
		.category_inverted = UFFD_PAGE_IS_WRITTEN,
		.category_anyof_mask = UFFD_PAGE_IS_PRESENT | UFFD_PAGE_IS_SWAPPED,
	};
	uint64_t count = 0, bytes = 0;
	int ret = uffd_pagemap_scan(pagemap_fd, &arg, &count);

	if (!ret)
		ret = uffd_pagemap_bytes(found, count, &bytes);
	if (!ret && !count)
		ret = uffd_pagemap_alive(pagemap_fd);
	*pages_ret = bytes / BASE_PAGE;
	return ret;
}

int uffd_pages_read(int32_t pid, int mem_fd, uint64_t start, uint64_t pages, void *memory)
{
	struct iovec here = { memory, pages * BASE_PAGE };
	struct iovec there = { (void *)(uintptr_t)start, pages * BASE_PAGE };

	if (process_vm_readv(pid, &here, 1, &there, 1, 0) == (ssize_t)here.iov_len)
		return 0;
	if (mem_fd >= 0 &&
	    pread(mem_fd, memory, here.iov_len, (off_t)start) == (ssize_t)here.iov_len)
		return 0;
	return -EFAULT;
}

int uffd_pages_note(struct uffd_page_ranges *noted, uint64_t start, uint64_t end, uint64_t kind)
{
	if (noted->count == noted->capacity) {
		uint64_t capacity = noted->capacity ? 2 * noted->capacity : FIRST_CAPACITY;
		struct uffd_page_region *vec = realloc(noted->vec, capacity * sizeof(*vec));

		if (!vec)
			return -ENOMEM;
		noted->vec = vec;
		noted->capacity = capacity;
	}
	noted->vec[noted->count++] = (struct uffd_page_region){ start, end, kind };
	return 0;
}

static int by_start(const void *a, const void *b)
{
	const struct uffd_page_region *one = a, *other = b;

	return one->start < other->start ? -1 : one->start > other->start;
}

int uffd_pages_as_set(struct uffd_page_ranges *noted, uint64_t kind,
		      struct uffd_page_ranges *ranges_ret)
{
	int ret = 0;

	if (noted->count)
		qsort(noted->vec, noted->count, sizeof(*noted->vec), by_start);
	for (uint64_t i = 0; !ret && i < noted->count; i++) {
		const struct uffd_page_region *range = &noted->vec[i];
		uint64_t reached = ranges_ret->count ? ranges_ret->vec[ranges_ret->count - 1].end : 0;

		if (range->categories >= kind)
			ret = uffd_ranges_append(ranges_ret,
						 range->start > reached ? range->start : reached,
						 range->end);
	}
	return ret;
}
