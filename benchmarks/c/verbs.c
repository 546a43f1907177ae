/* SPDX-License-Identifier: MIT */
/*
 * verbs WHAT LENGTH PIECE REPEATS: what a verb of Handler does, by bare system calls on LENGTH bytes of
 * anonymous memory.
 *
 * WHAT  checkpoint  every tenth page is dirty: read the page table, note each page's state, protect
 *                   2 MiB at a time, and list the dirty runs
 *       fill        UFFDIO_COPY, PIECE bytes at a time
 *       evict       every second piece of PIECE bytes is there and dirty: protect, pwrite(2),
 *                   MADV_DONTNEED, and UFFDIO_COPY again
 */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define DIRTY_STEP 10u
#define AT_ONCE (HUGE_PAGE / SMALL_PAGE)

enum state { CLEAN = 2, DIRTY = 3, HELD = 8 };

struct run {
	uint64_t start, end, state;
};

struct verbs {
	enum { CHECKPOINT, FILL, EVICT } what;
	uint64_t length, piece, repeats;
	uint8_t *start, *source;
	int uffd, pagemap, file;
	_Atomic uint8_t *states;
	uint8_t *replaced;
	struct run *runs;
};

static void protect(const struct verbs *verbs, uint64_t offset, uint64_t length, uint64_t mode)
{
	struct uffdio_writeprotect wp = {
		.range = { .start = (uintptr_t)verbs->start + offset, .len = length },
		.mode = mode,
	};

	if (ioctl(verbs->uffd, UFFDIO_WRITEPROTECT, &wp))
		die("UFFDIO_WRITEPROTECT");
}

static void copy(const struct verbs *verbs, uint64_t offset, uint64_t length, uint64_t mode)
{
	struct uffdio_copy arg = {
		.dst = (uintptr_t)verbs->start + offset,
		.src = (uintptr_t)verbs->source + offset,
		.len = length,
		.mode = mode,
	};

	if (ioctl(verbs->uffd, UFFDIO_COPY, &arg))
		die("UFFDIO_COPY");
}

static void dirty(struct verbs *verbs)
{
	for (uint64_t page = 0; page < verbs->length / SMALL_PAGE; page += DIRTY_STEP) {
		protect(verbs, page * SMALL_PAGE, SMALL_PAGE, 0);
		verbs->start[page * SMALL_PAGE] = 2;
		verbs->states[page] = DIRTY;
	}
}

/* The same steps as the engine's: each page is held while it is protected. */
static void checkpoint_part(struct verbs *verbs, uint64_t first)
{
	uint64_t entries[AT_ONCE];
	off_t at = (off_t)(((uintptr_t)verbs->start / SMALL_PAGE + first) * sizeof(uint64_t));

	for (uint64_t i = first; i < first + AT_ONCE; i++) {
		uint8_t state = atomic_load(&verbs->states[i]);

		verbs->replaced[i] = state;
		if (!atomic_compare_exchange_strong(&verbs->states[i], &state, HELD))
			die("a state changed");
	}
	if (pread(verbs->pagemap, entries, sizeof(entries), at) != sizeof(entries))
		die("pread of the pagemap");
	for (uint64_t i = 0; i < AT_ONCE; i++)
		if (!(entries[i] & UFFD_PM_UFFD_WP))
			verbs->replaced[first + i] = DIRTY;
	protect(verbs, first * SMALL_PAGE, HUGE_PAGE, UFFDIO_WRITEPROTECT_MODE_WP);
	for (uint64_t i = first; i < first + AT_ONCE; i++)
		atomic_store(&verbs->states[i], CLEAN);
}

static void checkpoint(struct verbs *verbs)
{
	uint64_t pages = verbs->length / SMALL_PAGE, found = 0;

	for (uint64_t page = 0; page < pages; page += AT_ONCE)
		checkpoint_part(verbs, page);
	for (uint64_t page = 0, first; page < pages;) {
		uint8_t state = verbs->replaced[page];

		for (first = page; page < pages && verbs->replaced[page] == state;)
			page++;
		if (state != CLEAN)
			verbs->runs[found++] = (struct run){ first, page, state };
	}
	if (found != (pages + DIRTY_STEP - 1) / DIRTY_STEP)
		die("%lu runs", (unsigned long)found);
}

static void evict(const struct verbs *verbs)
{
	protect(verbs, 0, verbs->length, UFFDIO_WRITEPROTECT_MODE_WP);
	for (uint64_t at = 0; at < verbs->length; at += 2 * verbs->piece) {
		if (pwrite(verbs->file, verbs->start + at, verbs->piece, (off_t)at) !=
		    (ssize_t)verbs->piece)
			die("pwrite");
		if (madvise(verbs->start + at, verbs->piece, MADV_DONTNEED))
			die("madvise");
	}
	for (uint64_t at = 0; at < verbs->length; at += 2 * verbs->piece)
		copy(verbs, at, verbs->piece, UFFDIO_COPY_MODE_WP);
}

static uint64_t run_round(void *context, uint64_t *samples)
{
	struct verbs *verbs = context;
	uint64_t total_ns = 0;

	for (uint64_t i = 0; i < verbs->repeats; i++) {
		uint64_t begin_ns;

		if (verbs->what == CHECKPOINT)
			dirty(verbs);
		else if (verbs->what == FILL)
			madvise(verbs->start, verbs->length, MADV_DONTNEED);
		else
			protect(verbs, 0, verbs->length, 0);
		begin_ns = now_ns();
		if (verbs->what == CHECKPOINT)
			checkpoint(verbs);
		else if (verbs->what == EVICT)
			evict(verbs);
		else
			for (uint64_t at = 0; at < verbs->length; at += verbs->piece)
				copy(verbs, at, verbs->piece, 0);
		samples[i] = now_ns() - begin_ns;
		total_ns += samples[i];
	}
	return total_ns;
}

static void prepare(struct verbs *verbs)
{
	uint64_t pages = verbs->length / SMALL_PAGE;
	uint64_t mode = verbs->what == CHECKPOINT ? UFFDIO_REGISTER_MODE_WP
			: verbs->what == FILL	  ? UFFDIO_REGISTER_MODE_MISSING
						  : UFFDIO_REGISTER_MODE_MISSING |
							    UFFDIO_REGISTER_MODE_WP;
	int fd;

	verbs->start = map_memory(ANON, verbs->length, &fd);
	verbs->uffd = open_uffd(0, UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED);
	register_range(verbs->uffd, verbs->start, verbs->length, mode);
	verbs->states = malloc(pages);
	verbs->replaced = malloc(pages);
	verbs->runs = malloc(pages * sizeof(*verbs->runs));
	verbs->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (!verbs->states || !verbs->replaced || !verbs->runs || verbs->pagemap < 0)
		die("memory or /proc/self/pagemap");
	memset((void *)verbs->states, CLEAN, pages);
	if (verbs->what == CHECKPOINT) {
		memset(verbs->start, 1, verbs->length);
		protect(verbs, 0, verbs->length, UFFDIO_WRITEPROTECT_MODE_WP);
		return;
	}
	verbs->file = memfd_create("source", MFD_CLOEXEC);
	if (verbs->file < 0 || ftruncate(verbs->file, (off_t)verbs->length))
		die("memfd_create");
	verbs->source = mmap(NULL, verbs->length, PROT_READ | PROT_WRITE, MAP_SHARED, verbs->file, 0);
	if (verbs->source == MAP_FAILED)
		die("mmap");
	memset(verbs->source, 1, verbs->length);
	if (verbs->what == FILL)
		copy(verbs, 0, verbs->length, 0);
	else
		for (uint64_t at = 0; at < verbs->length; at += 2 * verbs->piece)
			copy(verbs, at, verbs->piece, UFFDIO_COPY_MODE_WP);
}

int main(int argc, char **argv)
{
	struct verbs verbs = { 0 };

	if (argc != 5)
		die("usage: verbs WHAT LENGTH PIECE REPEATS");
	if (!strcmp(argv[1], "checkpoint"))
		verbs.what = CHECKPOINT;
	else if (!strcmp(argv[1], "fill"))
		verbs.what = FILL;
	else if (!strcmp(argv[1], "evict"))
		verbs.what = EVICT;
	else
		die("unknown word %s", argv[1]);
	verbs.length = strtoull(argv[2], NULL, 0);
	verbs.piece = strtoull(argv[3], NULL, 0);
	verbs.repeats = strtoull(argv[4], NULL, 0);
	prepare(&verbs);
	serve_rounds(run_round, &verbs, verbs.repeats);
	return 0;
}
