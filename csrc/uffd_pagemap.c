// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/page.h"
#include "uffd_pagemap.h"

#define ENTRY_BYTES sizeof(uint64_t)

/* A scan's first vector. Untouched memory costs nothing; 1 MiB saves most scans a second ioctl. */
#define FIRST_RANGES ((1u << 20) / sizeof(struct uffd_page_region))

void uffd_pagemap_release(struct uffd_page_ranges *ranges)
{
	free(ranges->vec);
	*ranges = (struct uffd_page_ranges){ 0 };
}

static int pread_entries(int fd, uint64_t start, uint64_t pages, uint64_t *entries, uint64_t *ret)
{
	ssize_t n;

	do
		n = pread(fd, entries, pages * ENTRY_BYTES, (off_t)(start / BASE_PAGE * ENTRY_BYTES));
	while (n < 0 && errno == EINTR);
	*ret = n < 0 ? 0 : (uint64_t)n / ENTRY_BYTES;
	return n < 0 ? -errno : 0;
}

int uffd_pagemap_alive(int fd)
{
	uint64_t entry, got;
	int ret = pread_entries(fd, 0, 1, &entry, &got);

	if (ret)
		return ret;
	return got ? 0 : -ESRCH;
}

int uffd_pagemap_read(int fd, uint64_t start, uint64_t pages, uint64_t *entries,
		      uint64_t *pages_ret)
{
	uint64_t done = 0;
	int ret = 0;

	while (done < pages) {
		uint64_t got;

		ret = pread_entries(fd, start + done * BASE_PAGE, pages - done, entries + done, &got);
		if (ret)
			break;
		if (!got) {
			ret = uffd_pagemap_alive(fd);
			if (!ret)
				ret = -EFAULT;
			break;
		}
		done += got;
	}
	*pages_ret = done;
	return ret;
}

int uffd_pagemap_count(const uint64_t *entries, uint64_t pages, uint64_t mask, uint64_t value,
		       uint64_t *count_ret)
{
	uint64_t count = 0;

	for (uint64_t i = 0; i < pages; i++)
		count += (entries[i] & mask) == value;
	*count_ret = count;
	return 0;
}

static int resize(struct uffd_page_ranges *ranges, uint64_t capacity)
{
	struct uffd_page_region *vec;

	if (capacity > SIZE_MAX / sizeof(*vec))
		return -ENOMEM;
	vec = realloc(ranges->vec, (capacity ? capacity : 1) * sizeof(*vec));
	if (!vec)
		return -ENOMEM;
	ranges->vec = vec;
	ranges->capacity = capacity;
	return 0;
}

/*
 * Free unused memory; a failure is harmless. Keep up to half unused, so that the allocator sees
 * blocks of the same size and reuses them, instead of the kernel zeroing pages each time.
 */
static void shrink(struct uffd_page_ranges *ranges)
{
	if (ranges->vec && ranges->count < ranges->capacity / 2)
		resize(ranges, ranges->count);
}

static int append(struct uffd_page_ranges *ranges, uint64_t start, uint64_t end)
{
	if (ranges->count == ranges->capacity) {
		int ret = resize(ranges, ranges->capacity ? 2 * ranges->capacity : 64);

		if (ret)
			return ret;
	}
	ranges->vec[ranges->count++] = (struct uffd_page_region){ .start = start, .end = end };
	return 0;
}

int uffd_pagemap_runs(const uint64_t *entries, uint64_t pages, uint64_t start, uint64_t mask,
		      uint64_t value, struct uffd_page_ranges *ranges_ret)
{
	int ret = 0;

	for (uint64_t i = 0; i < pages && !ret; i++) {
		uint64_t first = i;

		while (i < pages && (entries[i] & mask) == value)
			i++;
		if (i > first)
			ret = append(ranges_ret, start + first * BASE_PAGE, start + i * BASE_PAGE);
	}
	shrink(ranges_ret);
	return ret;
}

int uffd_pagemap_state_runs(const uint8_t *states, uint64_t pages, uint64_t start,
			    uint64_t page_size, uint8_t state, struct uffd_page_ranges *ranges_ret)
{
	int ret = 0;

	for (uint64_t i = 0; i < pages && !ret; i++) {
		uint64_t first = i;

		while (i < pages && states[i] == state)
			i++;
		if (i > first)
			ret = append(ranges_ret, start + first * page_size, start + i * page_size);
	}
	shrink(ranges_ret);
	return ret;
}

int uffd_pagemap_scan(int fd, struct uffd_pm_scan_arg *arg, uint64_t *count_ret)
{
	int ret;

	do
		ret = ioctl(fd, UFFD_PAGEMAP_SCAN, arg);
	while (ret < 0 && errno == EINTR);
	*count_ret = ret < 0 ? 0 : (uint64_t)ret;
	return ret < 0 ? -errno : 0;
}

int uffd_pagemap_first_of(int fd, const uint64_t *spans, uint64_t count, uint64_t anyof,
			  uint64_t *index_ret)
{
	struct uffd_page_region region;
	uint64_t found = 0;
	int ret = 0;

	for (*index_ret = 0; *index_ret < count; (*index_ret)++) {
		const uint64_t *span = &spans[2 * *index_ret];
		struct uffd_pm_scan_arg arg = {
			.size = sizeof(arg),
			.start = span[0],
			.end = span[0] + span[1],
			.vec = (uintptr_t)&region,
			.vec_len = 1,
			.category_anyof_mask = anyof,
			.return_mask = anyof,
		};

		ret = uffd_pagemap_scan(fd, &arg, &found);
		if (ret || found)
			break;
	}
	return ret;
}

/* Add vec[count..count + found) to @ranges; join the first with the last one if adjacent. */
static void take(struct uffd_page_ranges *ranges, uint64_t found)
{
	struct uffd_page_region *next = ranges->vec + ranges->count;

	if (found && ranges->count && next[-1].end == next->start &&
	    next[-1].categories == next->categories) {
		next[-1].end = next->end;
		found--;
		memmove(next, next + 1, found * sizeof(*next));
	}
	ranges->count += found;
}

int uffd_pagemap_bytes(const struct uffd_page_region *vec, uint64_t count, uint64_t *bytes_ret)
{
	uint64_t bytes = 0;

	for (uint64_t i = 0; i < count; i++)
		bytes += vec[i].end - vec[i].start;
	*bytes_ret = bytes;
	return 0;
}

static int reserve(struct uffd_page_ranges *ranges, uint64_t wanted)
{
	return wanted <= ranges->capacity ? 0 : resize(ranges, wanted);
}

/*
 * A scan that write-protects and checks for WP_ASYNC fails at the first mapping without it. By then
 * it has protected the pages before that and written their ranges to vec, but does not say how
 * many. So vec is zeroed before such a scan, and the first range that ends at 0 was not written.
 */
static uint64_t found_before_error(const struct uffd_pm_scan_arg *arg)
{
	const struct uffd_page_region *vec = (const void *)(uintptr_t)arg->vec;
	uint64_t found = 0;

	while (found < arg->vec_len && vec[found].end)
		found++;
	return found;
}

/*
 * Where a successful ioctl really stopped, and whether the scan is done.
 *
 * Linux 6.18 leaves two things to guess (fs/proc/task_mmu.c, do_pagemap_scan()):
 * - It copies ranges out in batches of 512 and sets walk_end at each; a walk that then reaches its
 *   end leaves the walk_end of the last batch. So a walk that met no limit has reached its end.
 * - It skips a hugetlb page if max_pages would protect only a part of it, and continues over the
 *   next ones, which it skips too. So with WP_MATCHING and max_pages, scan the rest after the last
 *   range again, until there is none or it has no matches.
 */
static void walked(const struct uffd_pm_scan_arg *arg, uint64_t found, uint64_t pages,
		   uint64_t *walk_end, bool *done)
{
	const struct uffd_page_region *vec = (const void *)(uintptr_t)arg->vec;
	uint64_t last = found ? vec[found - 1].end : arg->start;

	*done = true;
	if (arg->walk_end >= arg->end) {
		*walk_end = arg->end;
	} else if (arg->max_pages && pages >= arg->max_pages) {
		*walk_end = arg->walk_end > last ? arg->walk_end : last;
	} else if (found && found == arg->vec_len) {
		*walk_end = arg->walk_end > last ? arg->walk_end : last;
		*done = *walk_end >= arg->end;
	} else if (arg->max_pages && arg->flags & UFFD_PM_SCAN_WP_MATCHING) {
		*walk_end = last;
		*done = !found;
	} else {
		*walk_end = arg->end;
	}
}

static int scan_all(int fd, const struct uffd_pm_scan_arg *request, uint64_t room,
		    struct uffd_page_ranges *ranges, uint64_t *walk_end)
{
	const uint64_t loses = UFFD_PM_SCAN_WP_MATCHING | UFFD_PM_SCAN_CHECK_WPASYNC;
	uint64_t most = lower(request->vec_len, (request->end - request->start) / BASE_PAGE);
	struct uffd_pm_scan_arg arg = *request;
	bool keep = most && (request->flags & loses) == loses;
	uint64_t found, bytes = 0;
	bool done;
	int ret;

	arg.size = sizeof(arg);
	do {
		if (most) {
			uint64_t wanted = lower(ranges->count + room, most);

			ret = reserve(ranges, wanted);
			if (ret)
				return ret;
			arg.vec = (uintptr_t)(ranges->vec + ranges->count);
			arg.vec_len = wanted - ranges->count;
			room *= 2;
		} else {
			arg.vec = 0;
			arg.vec_len = 0;
		}
		arg.start = *walk_end;
		arg.walk_end = 0;
		if (keep)
			memset(ranges->vec + ranges->count, 0, arg.vec_len * sizeof(*ranges->vec));

		ret = uffd_pagemap_scan(fd, &arg, &found);
		if (ret) {
			if (keep)
				take(ranges, found_before_error(&arg));
			if (ranges->count)
				*walk_end = ranges->vec[ranges->count - 1].end;
			return ret;
		}
		if (arg.max_pages)
			uffd_pagemap_bytes(ranges->vec + ranges->count, found, &bytes);
		walked(&arg, found, bytes / BASE_PAGE, walk_end, &done);
		take(ranges, found);
		if (arg.max_pages)
			arg.max_pages -= bytes / BASE_PAGE;
	} while (!done && ranges->count < most);
	return *walk_end == request->start ? -ENOSPC : 0;
}

int uffd_pagemap_scan_all(int fd, const struct uffd_pm_scan_arg *request,
			  struct uffd_page_ranges *ranges_ret, uint64_t *walk_end_ret)
{
	int ret;

	*walk_end_ret = request->start;
	ret = scan_all(fd, request, FIRST_RANGES, ranges_ret, walk_end_ret);
	shrink(ranges_ret);
	return ret;
}

int uffd_pagemap_scan_again(int fd, const struct uffd_pm_scan_arg *request, uint64_t expected,
			    struct uffd_page_ranges *ranges)
{
	uint64_t walk_end = request->start;

	ranges->count = 0;
	return scan_all(fd, request, expected + 1, ranges, &walk_end);
}
