// SPDX-License-Identifier: MIT
/*
 * A program whose memory shows the instant of an image: counters THREADS PAGES [HOW].
 *
 * Each thread writes its number of rounds into the first word of its pages, one page after the
 * other.  So at any instant its pages hold n up to some page, and n - 1 after it.  The second word
 * is the number that the previous thread's first page held when this page was written: at no
 * instant can it be larger than the number in that page.
 * HOW, letters: d drops a page now and then (MADV_DONTNEED) and writes it again, m moves memory
 * (mremap), s sleeps a little after each round, longer if the round was long, f makes children.
 *
 * Prints "ready" and the address of each thread's pages on one line; then, for each line read, the
 * smallest number of rounds.  It ends if a page holds anything but n or n - 1.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define MOST 64
#define FIXED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED)

static unsigned int threads;
static uint64_t pages;
static const char *how = "";
static volatile uint64_t *areas[MOST];
static volatile uint64_t rounds[MOST];
static volatile uint64_t *moved, *other;

static void move_memory(uint64_t n)
{
	uint64_t length = 64 * PAGE;
	volatile uint64_t *to = n & 1 ? other : moved, *from = n & 1 ? moved : other;

	for (unsigned int i = 0; i < 64; i++)
		if (from[i * WORDS] != 0x5eed + i)
			abort();
	if (mremap((void *)from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) != to ||
	    mmap((void *)from, length, PROT_NONE, FIXED, -1, 0) != from)
		abort();
}

static void drop_page(volatile uint64_t *page, uint64_t was)
{
	uint64_t before = page[1];

	if (madvise((void *)page, PAGE, MADV_DONTNEED))
		abort();
	page[1] = before;
	page[0] = was;
}

static void *count(void *argument)
{
	unsigned int self = (unsigned int)(uintptr_t)argument;
	unsigned int before = (self + threads - 1) % threads;
	volatile uint64_t *area = areas[self];

	for (uint64_t n = 1;; n++) {
		for (uint64_t i = 0; i < pages; i++) {
			if (area[i * WORDS] != n - 1)
				abort();
			area[i * WORDS + 1] = areas[before][0];
			area[i * WORDS] = n;
		}
		rounds[self] = n;
		if (strchr(how, 'd'))
			drop_page(&area[(n * 7 + self) % pages * WORDS], n);
		if (strchr(how, 'm') && !self)
			move_memory(n);
		if (strchr(how, 'f') && !self && !fork())
			_exit(area[0] != n);
		if (strchr(how, 'f') && !self)
			wait(NULL);
		if (strchr(how, 's'))
			usleep(1000 + (useconds_t)pages);
	}
	return NULL;
}

static void *map(uint64_t length)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		abort();
	return memory;
}

int main(int argc, char **argv)
{
	char line[16];

	if (argc < 3)
		return 2;
	threads = (unsigned int)atoi(argv[1]);
	pages = (uint64_t)atoll(argv[2]);
	how = argc > 3 ? argv[3] : "";
	moved = map(64 * PAGE);
	other = map(64 * PAGE);
	for (unsigned int i = 0; i < 64; i++)
		moved[i * WORDS] = 0x5eed + i;
	for (unsigned int i = 0; i < threads; i++) {
		areas[i] = map(pages * PAGE);
		for (uint64_t page = 0; page < pages; page++)
			areas[i][page * WORDS] = 0;
	}
	for (unsigned int i = 0; i < threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, count, (void *)(uintptr_t)i))
			abort();
	}
	printf("ready");
	for (unsigned int i = 0; i < threads; i++)
		printf(" %#lx", (unsigned long)areas[i]);
	printf(" %#lx %#lx\n", (unsigned long)moved, (unsigned long)other);
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		uint64_t least = rounds[0];

		for (unsigned int i = 1; i < threads; i++)
			least = rounds[i] < least ? rounds[i] : least;
		printf("%lu\n", (unsigned long)least);
		fflush(stdout);
	}
	return 0;
}
