// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/page.h"
#include "uffd_pagemap.h"
#include "uffd_residency.h"

/* Pages per step of uffd_residency_of(): 32 KiB of entries on the stack. */
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

int uffd_residency_of(int pagemap_fd, uint64_t start, uint64_t length, uint64_t page_size,
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
