// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/tasks.h"
#include "remote/cold.h"
#include "uffd_pagemap.h"

#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#ifndef MADV_COLD
#define MADV_COLD 20
#endif

#define FOUND 64u
#define STATUS_BYTES 4096u /* VmSwap is among the first 1,500, behind the groups */

/* True if it cannot be told. */
static bool is_swapping(int32_t pid)
{
	char text[STATUS_BYTES];
	const char *line;

	uffd_task_read(pid, "status", text, sizeof(text));
	line = strstr(text, "\nVmSwap:");
	return !line || strtoull(line + strlen("\nVmSwap:"), NULL, 10);
}

void uffd_cold_open(struct uffd_cold *cold, int32_t pid)
{
	cold->pidfd = cold->pagemap_fd = -1;
	cold->count = 0;
	if (!is_swapping(pid))
		return;
	cold->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	cold->pagemap_fd = uffd_task_open(pid, "pagemap", 0);
	if (cold->pagemap_fd < 0)
		uffd_cold_close(cold);
}

void uffd_cold_note(struct uffd_cold *cold, uint64_t start, uint64_t end)
{
	struct uffd_page_region found[FOUND];
	struct uffd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = start,
		.end = end,
		.vec = (uintptr_t)found,
		.vec_len = FOUND,
		.category_mask = UFFD_PAGE_IS_SWAPPED,
	};
	uint64_t n;

	while (cold->pidfd >= 0 && arg.start < end && cold->count < UFFD_COLD_MOST) {
		if (uffd_pagemap_scan(cold->pagemap_fd, &arg, &n))
			return;
		for (uint64_t i = 0; i < n && cold->count < UFFD_COLD_MOST; i++)
			cold->vec[cold->count++] =
				(struct iovec){ (void *)(uintptr_t)found[i].start,
						found[i].end - found[i].start };
		arg.start = arg.walk_end;
	}
}

void uffd_cold_again(struct uffd_cold *cold)
{
	/* It ends at a range that is unmapped by now; not worth another call. */
	if (cold->count && syscall(SYS_process_madvise, cold->pidfd, cold->vec, cold->count,
				   MADV_COLD, 0) < 0 &&
	    errno == EPERM)
		uffd_cold_close(cold);
	cold->count = 0;
}

void uffd_cold_close(struct uffd_cold *cold)
{
	if (cold->pidfd >= 0)
		close(cold->pidfd);
	if (cold->pagemap_fd >= 0)
		close(cold->pagemap_fd);
	cold->pidfd = cold->pagemap_fd = -1;
}
