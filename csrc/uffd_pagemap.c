// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/page.h"
#include "uffd_pagemap.h"

#define ENTRY_BYTES sizeof(uint64_t)

/* A scan's first vector. Untouched memory costs nothing; 1 MiB saves most scans a second ioctl. */
#define FIRST_RANGES ((1u << 20) / sizeof(struct uffd_page_region))

/* Pages per step of uffd_pagemap_residency(): 32 KiB of entries on the stack. */
#define STEP_PAGES 4096u

#ifndef __NR_cachestat
#define __NR_cachestat 451 /* Linux 6.5 */
#endif

struct cachestat_range {
	uint64_t off, len;
};

struct cachestat {
	uint64_t nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted;
};

/*
 * The type field of swap entries (include/linux/swap.h, swapops.h): the highest of the 32 types is
 * the PTE marker, and at most eight below it are migration, device and poison entries.
 */
#define SWAP_TYPE_MASK 0x1full
#define SWAP_TYPE_MARKER 31u
#define SWAP_TYPE_FIRST_SPECIAL 23u
#define SWAP_OFFSET_SHIFT 5
#define MARKER_POISONED (1ull << 1)

void uffd_pagemap_free(void *memory)
{
	free(memory);
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

/* The data or hole extent of a file that the last lookup fell into. */
struct extent {
	int fd;
	uint64_t start, end;
	bool data;
};

/* Whether the file has data at @offset; past its end it has none. */
static int seek_data(struct extent *extent, uint64_t offset, bool *data_ret)
{
	off_t at;

	if (offset < extent->start || offset >= extent->end) {
		at = lseek(extent->fd, (off_t)offset, SEEK_DATA);
		if (at < 0 && errno != ENXIO)
			return -errno;
		extent->start = offset;
		extent->data = at >= 0 && (uint64_t)at < offset + BASE_PAGE;
		if (!extent->data) {
			extent->end = at < 0 ? UINT64_MAX : (uint64_t)at / BASE_PAGE * BASE_PAGE;
		} else {
			at = lseek(extent->fd, at, SEEK_HOLE);
			if (at < 0)
				return -errno;
			extent->end = ((uint64_t)at + BASE_PAGE - 1) / BASE_PAGE * BASE_PAGE;
		}
	}
	*data_ret = extent->data;
	return 0;
}

/*
 * The state by the page table alone; -1 if the page cache must tell: the PTE is none, or a marker
 * (of write-protection or a guard page) that stands for none.
 *
 * The kernel shows type and offset of a swap entry, and so markers, which have a type of their own,
 * only if the file was opened with CAP_SYS_ADMIN; otherwise both are 0, which no real entry has.
 */
static int state_of_entry(uint64_t entry, uint32_t mapping)
{
	uint64_t swap = entry & UFFD_PM_PFN_MASK;
	unsigned int type = swap & SWAP_TYPE_MASK;

	if (entry & UFFD_PM_PRESENT)
		return (mapping & UFFD_MAPPING_FILE) && !(entry & UFFD_PM_FILE) ?
			UFFD_RESIDENCY_PRIVATE : UFFD_RESIDENCY_MAPPED;
	if (!(entry & UFFD_PM_SWAP) || (entry & UFFD_PM_GUARD_REGION))
		return -1;
	if (swap && type == SWAP_TYPE_MARKER)
		return (swap >> SWAP_OFFSET_SHIFT) & MARKER_POISONED ? UFFD_RESIDENCY_POISON : -1;
	if (swap && type >= SWAP_TYPE_FIRST_SPECIAL)
		return UFFD_RESIDENCY_MAPPED; /* in memory: under migration or on a device */
	if (swap)
		return UFFD_RESIDENCY_SWAPPED;
	if (mapping & UFFD_MAPPING_SHARED)
		return entry & UFFD_PM_UFFD_WP ? -1 : UFFD_RESIDENCY_UNKNOWN;
	return entry & UFFD_PM_UFFD_WP ? UFFD_RESIDENCY_UNKNOWN : UFFD_RESIDENCY_SWAPPED;
}

static int state_of_cache(uint64_t offset, bool incore, uint32_t mapping, struct extent *extent,
			  uint8_t *state_ret)
{
	bool data = true;
	int ret = 0;

	if (!(mapping & UFFD_MAPPING_FILE)) {
		*state_ret = UFFD_RESIDENCY_HOLE;
		return 0;
	}
	if ((mapping & UFFD_MAPPING_MINCORE) && incore) {
		*state_ret = UFFD_RESIDENCY_RESIDENT;
		return 0;
	}
	if (mapping & UFFD_MAPPING_SEEK)
		ret = seek_data(extent, offset, &data);
	if (!data)
		*state_ret = UFFD_RESIDENCY_HOLE;
	else if ((mapping & UFFD_MAPPING_MINCORE) && (mapping & UFFD_MAPPING_SEEK))
		*state_ret = UFFD_RESIDENCY_SWAPPED;
	else
		*state_ret = UFFD_RESIDENCY_UNKNOWN;
	return ret;
}

/*
 * mincore(2) reports pages on swap as resident while they are in the swap cache, as pages just
 * paged out are. cachestat(2) counts only the page cache; without it mincore's result stands.
 */
static void find_swapped(int fd, uint64_t offset, uint64_t pages, uint8_t *states)
{
	struct cachestat_range range = { offset, pages * BASE_PAGE };
	struct cachestat stat = { 0 };

	if (syscall(__NR_cachestat, fd, &range, &stat, 0) || stat.nr_cache >= pages)
		return;
	if (!stat.nr_cache) {
		memset(states, UFFD_RESIDENCY_SWAPPED, pages);
		return;
	}
	find_swapped(fd, offset, pages / 2, states);
	find_swapped(fd, offset + pages / 2 * BASE_PAGE, pages - pages / 2, states + pages / 2);
}

static void check_resident(int fd, uint64_t offset, uint64_t pages, uint8_t *states)
{
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t first = i;

		while (i < pages && states[i] == UFFD_RESIDENCY_RESIDENT)
			i++;
		if (i > first)
			find_swapped(fd, offset + first * BASE_PAGE, i - first, states + first);
	}
}

int uffd_pagemap_residency(int pagemap_fd, uint64_t start, uint64_t length, uint64_t page_size,
			   int file_fd, uint64_t offset, uint32_t mapping, uint8_t *states_ret)
{
	uint64_t entries[STEP_PAGES];
	uint8_t incore[STEP_PAGES];
	struct extent extent = { .fd = file_fd };
	uint64_t pages = length / page_size;
	/* All entries of a huge page are alike: one read each. */
	uint64_t step = page_size == BASE_PAGE ? STEP_PAGES : 1;

	for (uint64_t done = 0; done < pages; done += step) {
		uint64_t n = lower(step, pages - done);
		uint64_t address = start + done * page_size;
		uint64_t got;
		int ret = uffd_pagemap_read(pagemap_fd, address, n, entries, &got);

		if (!ret && (mapping & UFFD_MAPPING_MINCORE) &&
		    mincore((void *)(uintptr_t)address, n * BASE_PAGE, incore))
			ret = -errno;
		if (ret)
			return ret;
		for (uint64_t i = 0; i < n; i++) {
			int state = state_of_entry(entries[i], mapping);

			if (state >= 0)
				states_ret[done + i] = (uint8_t)state;
			else
				ret = state_of_cache(offset + (done + i) * page_size, incore[i] & 1,
						     mapping, &extent, &states_ret[done + i]);
			if (ret)
				return ret;
		}
		if ((mapping & UFFD_MAPPING_MINCORE) && (mapping & UFFD_MAPPING_SEEK))
			check_resident(file_fd, offset + done * BASE_PAGE, n, states_ret + done);
	}
	return 0;
}
