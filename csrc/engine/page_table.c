// SPDX-License-Identifier: MIT
/*
 * Look into the owner's page table.  Our states record what we did; others may have filled
 * pages or removed their protection.  Async-signal-safe, except open_page_table().
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "page_table.h"

#define PAGES_AT_ONCE	512u

#define ENTRIES_AT_ONCE	64

/* A swap entry as CAP_SYS_ADMIN sees it, see uffd_pagemap.c; without it this reads as 0. */
#define SWAP_TYPE_MASK		0x1fu
#define SWAP_TYPE_MARKER	31u
#define SWAP_OFFSET_SHIFT	5
#define MARKER_POISONED		(UINT64_C(1) << 1)

/* In a PID namespace that kept the procfs of another one, our ids name other processes there. */
static bool proc_knows_us(void)
{
	char link[16] = "";

	return readlink("/proc/self", link, sizeof(link) - 1) > 0 && atoi(link) == getpid();
}

int open_page_table(int pid)
{
	char path[32];

	if (pid == getpid())
		return open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pid <= 0 || !proc_knows_us())
		return -1;
	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	return open(path, O_RDONLY | O_CLOEXEC);
}

static bool read_run(int fd, uint64_t at, uint64_t pages, uint64_t *entries)
{
	size_t length = pages * sizeof(*entries);

	return pread(fd, entries, length, (off_t)(at / BASE_PAGE * sizeof(*entries))) ==
	       (ssize_t)length;
}

bool read_entries(const struct uffd_range *range, uint64_t at, uint64_t pages,
		  uint64_t *entries_ret)
{
	int fd = range->space->pagemap_fd;

	if (fd < 0)
		return false;
	if (!is_huge(range))
		return read_run(fd, at, pages, entries_ret);
	/* All entries of a huge page are alike: read one each. */
	for (uint64_t i = 0; i < pages; i++)
		if (!read_run(fd, at + (i << range->page_shift), 1, &entries_ret[i]))
			return false;
	return true;
}

uint64_t unmapped_run(const struct uffd_range *range, uint64_t at, uint64_t length)
{
	uint64_t entries[ENTRIES_AT_ONCE], pages = length >> range->page_shift;

	for (uint64_t done = 0, n; done < pages; done += n) {
		n = pages - done < ENTRIES_AT_ONCE ? pages - done : ENTRIES_AT_ONCE;
		if (!read_entries(range, at + (done << range->page_shift), n, entries))
			return length;
		for (uint64_t i = 0; i < n; i++)
			if (entries[i] & UFFD_PM_PRESENT)
				return (done + i) << range->page_shift;
	}
	return length;
}

enum presence {
	NOT_THERE,
	IS_THERE,
	IS_POISONED,
	CANNOT_TELL,
};

static enum presence presence_of(const struct uffd_range *range, uint64_t entry)
{
	uint64_t swap = entry & UFFD_PM_PFN_MASK;

	if (entry & UFFD_PM_PRESENT)
		return IS_THERE;
	if (!(entry & UFFD_PM_SWAP))
		return NOT_THERE;
	if (swap && (swap & SWAP_TYPE_MASK) == SWAP_TYPE_MARKER)
		return (swap >> SWAP_OFFSET_SHIFT) & MARKER_POISONED ? IS_POISONED : NOT_THERE;
	if (swap)
		return IS_THERE;
	/* Shared memory has markers but no swap entries. */
	if (range->content->shared)
		return entry & UFFD_PM_UFFD_WP ? NOT_THERE : IS_POISONED;
	return CANNOT_TELL;
}

uint8_t seen_state(const struct uffd_range *range, uint8_t state, uint64_t entry)
{
	bool tracked = range->mode & UFFDIO_REGISTER_MODE_WP;
	bool protected = entry & UFFD_PM_UFFD_WP;
	enum presence presence = presence_of(range, entry);

	switch (state) {
	case UFFD_PAGE_ABSENT:
		/* Filled by others, or present before it was served. */
		if (presence == IS_POISONED)
			return UFFD_PAGE_POISONED;
		if (presence != IS_THERE)
			return state;
		return tracked && !protected ? UFFD_PAGE_DIRTY : UFFD_PAGE_CLEAN;
	case UFFD_PAGE_REMOVED:
		/*
		 * Present again, and perhaps written to.  Without protection only anonymous
		 * memory tells: we map the shared zero page, so an exclusive page was written
		 * to, or was never dropped (MADV_FREE).
		 */
		if (presence != IS_THERE || protected)
			return state;
		if (tracked)
			return UFFD_PAGE_DIRTY;
		return !is_huge(range) && !(entry & UFFD_PM_FILE) &&
			       entry & UFFD_PM_MMAP_EXCLUSIVE ? UFFD_PAGE_CLEAN : state;
	case UFFD_PAGE_CLEAN:
	case UFFD_PAGE_SAVED:
		/* Others removed the protection, or the page. */
		return tracked && !protected ? UFFD_PAGE_DIRTY : state;
	default:
		return state;
	}
}

bool has_page(const struct uffd_range *range, uint64_t entry)
{
	return presence_of(range, entry) == IS_THERE;
}

/*
 * The message may be older than the page's eviction, its drop, or its poison, which lifting
 * the protection leaves in place (Linux 6.18): a page that is not there was not written.  It
 * stays what it was, so that it gets its content, zeros, or no content as before.
 */
bool may_be_written(const struct uffd_range *range, uint64_t page, uint8_t was)
{
	uint64_t entry;

	if ((was != UFFD_PAGE_REMOVED && was != UFFD_PAGE_POISONED &&
	     (was != UFFD_PAGE_ABSENT || !can_be_absent(range))) ||
	    !read_entries(range, page, 1, &entry))
		return true;
	return has_page(range, entry);
}

/* Before Linux 6.7: look at each entry. */
static bool next_present_slowly(int fd, uint64_t at, uint64_t end, uint64_t *at_ret)
{
	uint64_t entries[PAGES_AT_ONCE];

	for (uint64_t n; at < end; at += n * BASE_PAGE) {
		n = lower((end - at) / BASE_PAGE, PAGES_AT_ONCE);
		if (!read_run(fd, at, n, entries))
			return false;
		for (uint64_t i = 0; i < n; i++) {
			*at_ret = at + i * BASE_PAGE;
			if (entries[i] & (UFFD_PM_PRESENT | UFFD_PM_SWAP))
				return true;
		}
	}
	return false;
}

bool next_present(int fd, uint64_t at, uint64_t end, uint64_t *at_ret)
{
	struct uffd_page_region found;
	struct uffd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = at,
		.end = end,
		.vec = (uint64_t)(uintptr_t)&found,
		.vec_len = 1,
		.max_pages = 1,
		.category_anyof_mask = UFFD_PAGE_IS_PRESENT | UFFD_PAGE_IS_SWAPPED,
		.return_mask = UFFD_PAGE_IS_PRESENT,
	};
	int n = ioctl(fd, UFFD_PAGEMAP_SCAN, &arg);

	if (n < 0)
		return next_present_slowly(fd, at, end, at_ret);
	*at_ret = found.start;
	return n > 0;
}

void note_present(struct uffd_range *range)
{
	uint64_t entries[PAGES_AT_ONCE];

	for (uint64_t at = range->start, n; at < range->end; at += n << range->page_shift) {
		n = lower((range->end - at) >> range->page_shift, PAGES_AT_ONCE);
		if (!read_entries(range, at, n, entries))
			break;
		for (uint64_t i = 0; i < n; i++) {
			_Atomic uint8_t *state = state_of(range, at + (i << range->page_shift));
			uint8_t was = atomic_load(state);

			/* In ranges with only WP, pages may have been protected before. */
			if (was == UFFD_PAGE_ABSENT)
				atomic_compare_exchange_strong(state, &was,
							       seen_state(range, was, entries[i]));
			else if (was == UFFD_PAGE_DIRTY && entries[i] & UFFD_PM_UFFD_WP &&
				 !range->content->preserve)
				atomic_compare_exchange_strong(state, &was, UFFD_PAGE_CLEAN);
		}
	}
}

bool is_mapped_here(const struct uffd_space *space, uint64_t address, uint64_t length)
{
	struct uffd_page_region found;
	struct uffd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = address & ~(BASE_PAGE - 1ull),
		.end = (address + length + BASE_PAGE - 1) & ~(BASE_PAGE - 1ull),
		.vec = (uint64_t)(uintptr_t)&found,
		.vec_len = 1,
		.max_pages = 1,
		/* The first page that is not present. */
		.category_inverted = UFFD_PAGE_IS_PRESENT,
		.category_mask = UFFD_PAGE_IS_PRESENT,
		.return_mask = UFFD_PAGE_IS_PRESENT,
	};

	return space->is_here && space->pagemap_fd >= 0 &&
	       ioctl(space->pagemap_fd, UFFD_PAGEMAP_SCAN, &arg) == 0;
}
