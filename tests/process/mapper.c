// SPDX-License-Identifier: MIT
/*
 * A program that maps, unmaps, writes, drops and protects memory at random, and notes in its own memory
 * what each page has, so that an image of it can be checked alone: mapper THREADS SEED FOLDER.
 *
 * Each thread has a few slots.  All words of a page are its thread, slot and page, and its version, which
 * grows with each write; pages of version 0 are as they were mapped.  What an operation is about to
 * change is noted before it begins, and may be in either state in an image.
 *
 * Prints the address of the notes when there is something in every slot, and runs until it is killed.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define THREADS_MOST 8u
#define SLOTS 6u
#define PAGES_MOST 200u
/* So that a program that copies it gets ahead. */
#define PAUSE_US 20

enum kind { ANONYMOUS, SHARED, MEMFD, FILE_, KINDS };

/* As tests/process/_mapper.py reads it: 64-bit words. */
struct slot {
	uint64_t address, pages, kind;
	/* What may be in either state: all of it, or `count` pages from `first` on. */
	uint64_t is_remapped, first, count;
	uint64_t versions[PAGES_MOST];
};

static struct slot (*notes)[SLOTS];
static atomic_uint filled;
static const char *folder;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void fill(uint64_t *page, uint64_t word)
{
	for (unsigned int i = 0; i < WORDS; i++)
		page[i] = word;
}

static uint64_t word_of(unsigned int thread, unsigned int number, uint64_t page, uint64_t version)
{
	return (uint64_t)(thread + 1) << 56 | (uint64_t)(number + 1) << 48 | page << 32 | version;
}

/* The pages of private files have version 0 in the file. */
static int file_of(unsigned int thread, unsigned int number, enum kind kind, uint64_t pages)
{
	char name[4096];
	uint64_t page[WORDS];
	int fd;

	if (kind == FILE_) {
		snprintf(name, sizeof(name), "%s/mapperXXXXXX", folder);
		fd = mkstemp(name);
		unlink(name);
	} else {
		fd = memfd_create("mapper", MFD_CLOEXEC);
	}
	if (fd < 0 || ftruncate(fd, (off_t)(pages * PAGE)))
		fail("a file");
	for (uint64_t i = 0; kind != SHARED && i < pages; i++) {
		fill(page, word_of(thread, number, i, 0));
		if (pwrite(fd, page, PAGE, (off_t)(i * PAGE)) != PAGE)
			fail("pwrite");
	}
	return fd;
}

static void map(struct slot *slot, unsigned int thread, unsigned int number, unsigned int *seed)
{
	enum kind kind = (enum kind)((unsigned int)rand_r(seed) % KINDS);
	uint64_t pages = 1 + (unsigned int)rand_r(seed) % PAGES_MOST;
	int flags = kind == SHARED ? MAP_SHARED : MAP_PRIVATE, fd = -1;
	void *start;

	slot->is_remapped = 1;
	atomic_signal_fence(memory_order_seq_cst);
	if (slot->address && munmap((void *)slot->address, slot->pages * PAGE))
		fail("munmap");
	if (kind == ANONYMOUS)
		flags |= MAP_ANONYMOUS;
	else
		fd = file_of(thread, number, kind, pages);
	start = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (start == MAP_FAILED)
		fail("mmap");
	if (fd >= 0)
		close(fd);
	if (!slot->address)
		atomic_fetch_add(&filled, 1);
	slot->address = (uint64_t)start;
	slot->pages = pages;
	slot->kind = kind;
	memset(slot->versions, 0, sizeof(slot->versions));
	atomic_signal_fence(memory_order_seq_cst);
	slot->is_remapped = 0;
}

static void change(struct slot *slot, unsigned int thread, unsigned int number, unsigned int *seed)
{
	uint64_t first = (unsigned int)rand_r(seed) % slot->pages;
	uint64_t count = 1 + (unsigned int)rand_r(seed) % 8;
	int drops = slot->kind != SHARED && rand_r(seed) % 4 == 0;

	if (count > slot->pages - first)
		count = slot->pages - first;
	slot->first = first;
	slot->count = count;
	atomic_signal_fence(memory_order_seq_cst);
	if (drops && madvise((char *)slot->address + first * PAGE, count * PAGE, MADV_DONTNEED))
		fail("madvise");
	for (uint64_t i = first; i < first + count; i++) {
		/* The high half is the last version, so that none comes twice. */
		uint64_t version = (slot->versions[i] >> 32) + 1;

		slot->versions[i] = drops ? version << 32 : version << 32 | version;
		if (!drops)
			fill((uint64_t *)(slot->address + i * PAGE),
			     word_of(thread, number, i, version));
	}
	atomic_signal_fence(memory_order_seq_cst);
	slot->count = 0;
}

/* Without permissions for a moment; what is there stays. */
static void hide(const struct slot *slot, unsigned int *seed)
{
	void *start = (void *)slot->address;

	if (mprotect(start, slot->pages * PAGE, rand_r(seed) % 2 ? PROT_NONE : PROT_READ))
		fail("mprotect");
	usleep((unsigned int)rand_r(seed) % 3000);
	if (mprotect(start, slot->pages * PAGE, PROT_READ | PROT_WRITE))
		fail("mprotect");
}

static void *run(void *argument)
{
	unsigned int thread = (unsigned int)(uintptr_t)argument, seed = (unsigned int)rand() + thread;

	for (unsigned int number = 0; number < SLOTS; number++)
		map(&notes[thread][number], thread, number, &seed);
	for (;;) {
		unsigned int number = (unsigned int)rand_r(&seed) % SLOTS;
		struct slot *slot = &notes[thread][number];
		unsigned int what = (unsigned int)rand_r(&seed) % 100;

		if (what < 4)
			map(slot, thread, number, &seed);
		else if (what < 5)
			hide(slot, &seed);
		else
			change(slot, thread, number, &seed);
		usleep(PAUSE_US);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	unsigned int threads = argc == 4 ? (unsigned int)atoi(argv[1]) : 0;

	if (!threads || threads > THREADS_MOST)
		return 2;
	srand((unsigned int)atoi(argv[2]));
	folder = argv[3];
	notes = mmap(NULL, sizeof(*notes) * threads, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (notes == MAP_FAILED)
		fail("mmap");
	for (uintptr_t i = 0; i < threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, run, (void *)i))
			fail("pthread_create");
	}
	while (atomic_load(&filled) < threads * SLOTS)
		usleep(1000);
	printf("%lx\n", (unsigned long)notes);
	fflush(stdout);
	for (;;)
		pause();
}
