// SPDX-License-Identifier: MIT
/*
 * A program that maps, unmaps, moves, resizes, writes, drops and protects memory and forks at random, and
 * notes in its own memory what each page has, so that an image of it can be checked alone:
 * mapper THREADS SEED FOLDER HUGE_PAGES.
 *
 * Each thread has a few slots.  All words of a page are its thread, slot and page, and its version, which
 * grows with each write; pages of version 0 are as they were mapped.  What an operation is about to
 * change is noted before it begins, and may be in either state in an image.
 *
 * Prints the address of the notes when there is something in every slot, and runs until its input ends.
 * For each line of its input it prints the longest time, in microseconds, that a thread has needed for
 * one operation since the last line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define THREADS_MOST 8u
#define SLOTS 6u
#define PAGES_MOST 200u
/* So that a program that copies it gets ahead. */
#define PAUSE_US 20
#define HUGE (2ul << 20)

/* THP: transparent huge pages; HUGETLB: private. */
enum kind { ANONYMOUS, SHARED, MEMFD, FILE_, THP, HUGETLB, KINDS };

/* As tests/process/_mapper.py reads it: 64-bit words. */
struct slot {
	uint64_t address, pages, kind;
	/* What may be in either state: all of it, or `count` pages from `first` on. */
	uint64_t is_remapped, first, count;
	/* Where it was before MREMAP_DONTUNMAP: pages of version 0. */
	uint64_t left, left_pages;
	uint64_t versions[PAGES_MOST];
};

static struct slot (*notes)[SLOTS];
/* Held by who maps, so that nobody else takes a place that is free for a moment. */
static pthread_mutex_t places = PTHREAD_MUTEX_INITIALIZER;
static atomic_uint filled;
static atomic_int huge_pages;
static atomic_ulong longest_us;
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
static int file_of(unsigned int thread, unsigned int number, enum kind kind)
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
	if (fd < 0 || ftruncate(fd, (off_t)(PAGES_MOST * PAGE)))
		fail("a file");
	for (uint64_t i = 0; kind != SHARED && i < PAGES_MOST; i++) {
		fill(page, word_of(thread, number, i, 0));
		if (pwrite(fd, page, PAGE, (off_t)(i * PAGE)) != PAGE)
			fail("pwrite");
	}
	return fd;
}

static uint64_t length_of(const struct slot *slot)
{
	return slot->kind >= THP ? HUGE : slot->pages * PAGE;
}

/* A free place, which an mremap(2) to it replaces. */
static char *free_place(uint64_t length)
{
	char *start = mmap(NULL, length + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *place = (char *)(((uintptr_t)start + HUGE - 1) & ~(HUGE - 1));

	if (start == MAP_FAILED)
		fail("mmap");
	if (place > start && munmap(start, (size_t)(place - start)))
		fail("munmap");
	if (place < start + HUGE && munmap(place + length, (size_t)(start + HUGE - place)))
		fail("munmap");
	return place;
}

/*
 * Move memory to a free place.  Where it is partly registered with a userfaultfd it is two mappings: the
 * kernel moves the first, or none, and says EFAULT.
 */
static void move(char *from, uint64_t length, int flags, char *to)
{
	flags |= MREMAP_MAYMOVE | MREMAP_FIXED;
	if (mremap(from, length, length, flags, to) != MAP_FAILED)
		return;
	if (errno != EFAULT)
		fail("mremap");
	for (uint64_t at = 0; at < length; at += PAGE) {
		bool is_moved = !madvise(to + at, PAGE, MADV_POPULATE_READ);

		if (!is_moved && mremap(from + at, PAGE, PAGE, flags, to + at) == MAP_FAILED)
			fail("mremap");
	}
}

static void unmap_left(struct slot *slot)
{
	if (slot->left_pages && munmap((void *)slot->left, slot->left_pages * PAGE))
		fail("munmap");
	slot->left_pages = 0;
}

static void *mapped(const struct slot *slot, int fd)
{
	int flags = slot->kind == SHARED ? MAP_SHARED : MAP_PRIVATE;
	void *start = NULL;

	if (slot->kind == HUGETLB)
		flags |= MAP_HUGETLB;
	if (slot->kind == THP) {
		start = free_place(HUGE);
		flags |= MAP_FIXED;
	}
	if (fd < 0)
		flags |= MAP_ANONYMOUS;
	start = mmap(start, length_of(slot), PROT_READ | PROT_WRITE, flags, fd, 0);
	if (start == MAP_FAILED)
		fail("mmap");
	if (slot->kind == THP && madvise(start, HUGE, MADV_HUGEPAGE))
		fail("madvise");
	return start;
}

static void map(struct slot *slot, unsigned int thread, unsigned int number, unsigned int *seed)
{
	enum kind kind = (enum kind)((unsigned int)rand_r(seed) % KINDS);
	int fd = -1;

	slot->is_remapped = 1;
	atomic_signal_fence(memory_order_seq_cst);
	unmap_left(slot);
	if (slot->address && munmap((void *)slot->address, length_of(slot)))
		fail("munmap");
	if (!slot->address)
		atomic_fetch_add(&filled, 1);
	else if (slot->kind == HUGETLB)
		atomic_fetch_add(&huge_pages, 1);
	if (kind == HUGETLB && atomic_fetch_sub(&huge_pages, 1) <= 0) {
		atomic_fetch_add(&huge_pages, 1);
		kind = ANONYMOUS;
	}
	slot->kind = kind;
	slot->pages = 1 + (unsigned int)rand_r(seed) % PAGES_MOST;
	if (kind == SHARED || kind == MEMFD || kind == FILE_)
		fd = file_of(thread, number, kind);
	slot->address = (uint64_t)mapped(slot, fd);
	if (fd >= 0)
		close(fd);
	memset(slot->versions, 0, sizeof(slot->versions));
	atomic_signal_fence(memory_order_seq_cst);
	slot->is_remapped = 0;
}

/* Shrink or grow, there or elsewhere. */
static void resize(struct slot *slot, unsigned int *seed)
{
	uint64_t pages = 1 + (unsigned int)rand_r(seed) % PAGES_MOST;
	void *start;

	if (slot->kind >= THP)
		return;
	slot->is_remapped = 1;
	atomic_signal_fence(memory_order_seq_cst);
	start = mremap((void *)slot->address, slot->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
	if (start == MAP_FAILED) {
		if (errno != EFAULT) /* two mappings, as in move() */
			fail("mremap");
		start = (void *)slot->address;
		pages = slot->pages;
	}
	/* The file of a shared mapping keeps what is written. */
	for (uint64_t i = pages; slot->kind != SHARED && i < slot->pages; i++)
		slot->versions[i] = slot->versions[i] >> 32 << 32;
	slot->address = (uint64_t)start;
	slot->pages = pages;
	atomic_signal_fence(memory_order_seq_cst);
	slot->is_remapped = 0;
}

static void relocate(struct slot *slot, unsigned int *seed)
{
	bool leaves = slot->kind != SHARED && slot->kind < THP && rand_r(seed) % 2;
	char *place = free_place(length_of(slot));

	slot->is_remapped = 1;
	atomic_signal_fence(memory_order_seq_cst);
	unmap_left(slot);
	move((char *)slot->address, length_of(slot), leaves ? MREMAP_DONTUNMAP : 0, place);
	if (leaves) {
		slot->left = slot->address;
		slot->left_pages = slot->pages;
	}
	slot->address = (uint64_t)place;
	atomic_signal_fence(memory_order_seq_cst);
	slot->is_remapped = 0;
}

/* Some of it is elsewhere for a moment. */
static void detour(struct slot *slot, unsigned int *seed)
{
	uint64_t first = (unsigned int)rand_r(seed) % slot->pages;
	uint64_t count = 1 + (unsigned int)rand_r(seed) % 8;
	char *at = (char *)slot->address + first * PAGE, *place;

	if (slot->kind == HUGETLB)
		return;
	if (count > slot->pages - first)
		count = slot->pages - first;
	place = free_place(count * PAGE);
	slot->first = first;
	slot->count = count;
	atomic_signal_fence(memory_order_seq_cst);
	move(at, count * PAGE, 0, place);
	usleep((unsigned int)rand_r(seed) % 1000);
	move(place, count * PAGE, 0, at);
	atomic_signal_fence(memory_order_seq_cst);
	slot->count = 0;
}

static void remap(struct slot *slot, unsigned int thread, unsigned int number, unsigned int what,
		  unsigned int *seed)
{
	pthread_mutex_lock(&places);
	if (what < 30)
		map(slot, thread, number, seed);
	else if (what < 40)
		resize(slot, seed);
	else if (what < 50)
		relocate(slot, seed);
	else
		detour(slot, seed);
	pthread_mutex_unlock(&places);
}

/* A child that writes to its copy for a moment. */
static void copy(const struct slot *slots, unsigned int *seed)
{
	unsigned int us = (unsigned int)rand_r(seed) % 20000;
	pid_t child = fork();

	if (child < 0)
		fail("fork");
	if (child)
		return;
	for (unsigned int i = 0; i < SLOTS; i++)
		if (slots[i].kind != SHARED && slots[i].kind != HUGETLB)
			fill((uint64_t *)slots[i].address, ~0ul);
	usleep(us);
	_exit(0);
}

static void change(struct slot *slot, unsigned int thread, unsigned int number, unsigned int *seed)
{
	uint64_t first = (unsigned int)rand_r(seed) % slot->pages;
	uint64_t count = 1 + (unsigned int)rand_r(seed) % 8;
	bool drops = slot->kind != SHARED && rand_r(seed) % 4 == 0;

	if (drops && slot->kind == HUGETLB) {
		first = 0;
		count = slot->pages;
	}

	if (count > slot->pages - first)
		count = slot->pages - first;
	slot->first = first;
	slot->count = count;
	atomic_signal_fence(memory_order_seq_cst);
	if (drops && madvise((char *)slot->address + first * PAGE,
			     slot->kind == HUGETLB ? HUGE : count * PAGE, MADV_DONTNEED))
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

	if (mprotect(start, length_of(slot), rand_r(seed) % 2 ? PROT_NONE : PROT_READ))
		fail("mprotect");
	usleep((unsigned int)rand_r(seed) % 3000);
	if (mprotect(start, length_of(slot), PROT_READ | PROT_WRITE))
		fail("mprotect");
}

static uint64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static void note_time(uint64_t us)
{
	unsigned long longest = atomic_load(&longest_us);

	while (us > longest && !atomic_compare_exchange_weak(&longest_us, &longest, us))
		;
}

static void *run(void *argument)
{
	unsigned int thread = (unsigned int)(uintptr_t)argument, seed = (unsigned int)rand() + thread;

	for (unsigned int number = 0; number < SLOTS; number++)
		remap(&notes[thread][number], thread, number, 0, &seed);
	for (;;) {
		unsigned int number = (unsigned int)rand_r(&seed) % SLOTS;
		struct slot *slot = &notes[thread][number];
		unsigned int what = (unsigned int)rand_r(&seed) % 1000;
		uint64_t begin = now_us();

		if (what < 55)
			remap(slot, thread, number, what, &seed);
		else if (what < 65)
			hide(slot, &seed);
		else if (what < 66)
			copy(notes[thread], &seed);
		else
			change(slot, thread, number, &seed);
		usleep(PAUSE_US);
		note_time(now_us() - begin);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	unsigned int threads = argc == 5 ? (unsigned int)atoi(argv[1]) : 0;

	if (!threads || threads > THREADS_MOST)
		return 2;
	srand((unsigned int)atoi(argv[2]));
	folder = argv[3];
	atomic_store(&huge_pages, atoi(argv[4]));
	signal(SIGCHLD, SIG_IGN);
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
	while (getchar() != EOF) {
		printf("%lu\n", atomic_exchange(&longest_us, 0));
		fflush(stdout);
	}
	return 0;
}
