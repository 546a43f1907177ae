/* SPDX-License-Identifier: MIT */
/*
 * scan WHAT LENGTH REPEATS: read the state of an anonymous region of LENGTH bytes, REPEATS times a
 * round.
 *
 * WHAT  scan     one PAGEMAP_SCAN that reports the written pages (every tenth one)
 *       reset    the same, and write-protects them again in the same call
 *       content  as reset, and reports of each page whether it has content; a scan for nothing but
 *                written pages has a shorter path in the kernel (pagemap_scan_pmd_entry)
 *       pagemap  one pread(2) of /proc/self/pagemap
 */
#include "bench.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define DIRTY_STEP 10u

struct scan {
	enum { SCAN, RESET, CONTENT, PAGEMAP } what;
	uint64_t length;
	uint64_t repeats;
	uint8_t *start;
	int pagemap;
	void *out;
	uint64_t out_length;
};

static void dirty(const struct scan *scan)
{
	for (uint64_t offset = 0; offset < scan->length; offset += DIRTY_STEP * SMALL_PAGE)
		*(volatile uint8_t *)(scan->start + offset) = 2;
}

static void do_scan(const struct scan *scan)
{
	uint64_t dirty_pages = (scan->length / SMALL_PAGE + DIRTY_STEP - 1) / DIRTY_STEP;
	struct uffd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = scan->what == SCAN ?
			 0 : UFFD_PM_SCAN_WP_MATCHING | UFFD_PM_SCAN_CHECK_WPASYNC,
		.start = (uintptr_t)scan->start,
		.end = (uintptr_t)scan->start + scan->length,
		.vec = (uintptr_t)scan->out,
		.vec_len = scan->out_length / sizeof(struct uffd_page_region),
		.category_mask = UFFD_PAGE_IS_WRITTEN,
		.return_mask = UFFD_PAGE_IS_WRITTEN,
	};
	long n;

	if (scan->what == CONTENT)
		arg.return_mask |= UFFD_PAGE_IS_PRESENT | UFFD_PAGE_IS_SWAPPED;
	n = ioctl(scan->pagemap, UFFD_PAGEMAP_SCAN, &arg);

	/* Do not use walk_end: Linux 6.18 leaves it at the last full batch of 512. */
	if (n < 0 || (uint64_t)n != dirty_pages)
		die("PAGEMAP_SCAN returned %ld", n);
}

static void do_pagemap(const struct scan *scan)
{
	off_t offset = (off_t)((uintptr_t)scan->start / SMALL_PAGE * sizeof(uint64_t));

	if (pread(scan->pagemap, scan->out, scan->out_length, offset) != (ssize_t)scan->out_length)
		die("pread of the pagemap");
}

static uint64_t run_round(void *context, uint64_t *samples)
{
	const struct scan *scan = context;
	uint64_t total_ns = 0;

	for (uint64_t i = 0; i < scan->repeats; i++) {
		uint64_t begin_ns;

		if (scan->what == RESET || scan->what == CONTENT)
			dirty(scan);
		begin_ns = now_ns();
		if (scan->what == PAGEMAP)
			do_pagemap(scan);
		else
			do_scan(scan);
		samples[i] = now_ns() - begin_ns;
		total_ns += samples[i];
	}
	return total_ns;
}

int main(int argc, char **argv)
{
	struct scan scan;
	int uffd, fd;

	if (argc != 4)
		die("usage: scan WHAT LENGTH REPEATS");
	if (!strcmp(argv[1], "scan"))
		scan.what = SCAN;
	else if (!strcmp(argv[1], "reset"))
		scan.what = RESET;
	else if (!strcmp(argv[1], "content"))
		scan.what = CONTENT;
	else if (!strcmp(argv[1], "pagemap"))
		scan.what = PAGEMAP;
	else
		die("unknown word %s", argv[1]);
	scan.length = strtoull(argv[2], NULL, 0);
	scan.repeats = strtoull(argv[3], NULL, 0);
	scan.start = map_memory(ANON, scan.length, &fd);
	memset(scan.start, 1, scan.length);
	scan.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (scan.pagemap < 0)
		die("/proc/self/pagemap");
	if (scan.what == PAGEMAP) {
		scan.out_length = scan.length / SMALL_PAGE * sizeof(uint64_t);
	} else {
		uffd = open_uffd(0, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED);
		register_range(uffd, scan.start, scan.length, UFFDIO_REGISTER_MODE_WP);
		write_protect(uffd, scan.start, scan.length);
		dirty(&scan);
		/* One more than the number of dirty pages, no two of which are neighbours. */
		scan.out_length = (scan.length / SMALL_PAGE / DIRTY_STEP + 2) *
				  sizeof(struct uffd_page_region);
	}
	scan.out = malloc(scan.out_length);
	if (!scan.out)
		die("malloc");
	memset(scan.out, 0, scan.out_length);
	serve_rounds(run_round, &scan, scan.repeats);
	return 0;
}
