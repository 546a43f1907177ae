// SPDX-License-Identifier: MIT
/*
 * A program with many threads that write: writers THREADS PAGES.
 *
 * Each thread writes its pages, one after the other, again and again.  Between any two pages is a
 * hole.  Prints the address and the length of all; then, for each line read, the longest time that a
 * thread needed for a page, in microseconds, since the last line.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define STEP (2 * PAGE)
#define STACK (16u << 10)
/* Many threads would leave no CPU to others. */
#define PAUSE_US 100000

static unsigned long threads, pages;
static volatile char *area;
static _Atomic uint64_t longest_us;

static uint64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

static void *write_pages(void *argument)
{
	unsigned long self = (unsigned long)(uintptr_t)argument;

	for (unsigned long round = 1;; round++) {
		for (unsigned long i = 0; i < pages; i++) {
			uint64_t began = now_us(), lasted, before;

			area[(i * threads + self) * STEP] = (char)round;
			lasted = now_us() - began;
			before = atomic_load(&longest_us);
			while (lasted > before &&
			       !atomic_compare_exchange_weak(&longest_us, &before, lasted))
				;
		}
		usleep(PAUSE_US);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_attr_t attributes;
	unsigned long length;
	char line[8];

	if (argc != 3)
		return 2;
	threads = strtoul(argv[1], NULL, 10);
	pages = strtoul(argv[2], NULL, 10);
	length = threads * pages * STEP;
	area = mmap(NULL, length, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area == MAP_FAILED)
		return 1;
	madvise((void *)area, length, MADV_NOHUGEPAGE);
	for (unsigned long at = 0; at < length; at += STEP)
		area[at] = 1;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	pthread_attr_setguardsize(&attributes, 0);
	for (unsigned long i = 0; i < threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, &attributes, write_pages, (void *)(uintptr_t)i))
			return 1;
	}
	printf("%lu %lu\n", (unsigned long)area, length);
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		printf("%lu\n", (unsigned long)atomic_exchange(&longest_us, 0));
		fflush(stdout);
	}
	return 0;
}
