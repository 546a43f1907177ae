// SPDX-License-Identifier: MIT
/*
 * What the owner's page table says: states of ours are what we did, and others may have
 * filled pages, or taken protection off, beside us.  Async-signal-safe, but for opening.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "uffd_engine_internal.h"

#define ENTRIES_AT_ONCE	64

int open_page_table(int pid)
{
	char path[32];

	if (pid <= 0)
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
	/* The entries of a huge page are alike: one each will do. */
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
