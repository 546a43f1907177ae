// SPDX-License-Identifier: MIT
/*
 * A program to take snapshots of: writers MIB THREADS PAGES_PER_S.
 *
 * Fills its memory with numbers that do not compress, and writes PAGES_PER_S pages, by its
 * threads together.  One more thread looks at the clock every 200 us.  Commands on standard input:
 * "reset"; "longest" prints the longest time between two looks since then, in nanoseconds; "write"
 * prints the longest time of a write likewise; "fork" prints how long fork(2) lasts; "touch N"
 * writes N pages that lie far from each other.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define LOOK_NS 200000

static char *memory;
static uint64_t pages, threads, rate;
static _Atomic uint64_t longest, longest_write;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void nap(uint64_t ns)
{
	struct timespec t = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };

	nanosleep(&t, NULL);
}

static void keep_most(_Atomic uint64_t *most, uint64_t value)
{
	uint64_t old = atomic_load(most);

	while (value > old && !atomic_compare_exchange_weak(most, &old, value))
		;
}

static void *look(void *nothing)
{
	uint64_t last = now();

	(void)nothing;
	for (;;) {
		uint64_t at;

		nap(LOOK_NS);
		at = now();
		keep_most(&longest, at - last);
		last = at;
	}
	return NULL;
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void *write_pages(void *number)
{
	uint64_t state = (uint64_t)(uintptr_t)number * 0x9e3779b97f4a7c15u + 1, done = 0;
	uint64_t begin = now();

	for (;;) {
		uint64_t due = begin + done++ * 1000000000u * threads / rate, at = now();
		volatile uint64_t *word;

		if (due > at)
			nap(due - at);
		word = (uint64_t *)(memory + next_random(&state) % pages * PAGE);
		at = now();
		*word = state;
		keep_most(&longest_write, now() - at);
	}
	return NULL;
}

static uint64_t time_of_fork(void)
{
	uint64_t begin = now(), end;
	pid_t pid = fork();

	if (!pid)
		_exit(0);
	end = now();
	waitpid(pid, NULL, 0);
	return end - begin;
}

int main(int count, char **words)
{
	uint64_t state = 1, touched = 0;
	char line[64];
	pthread_t thread;

	if (count != 4)
		return 2;
	pages = strtoull(words[1], NULL, 10) << 8;
	threads = strtoull(words[2], NULL, 10);
	rate = strtoull(words[3], NULL, 10);
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
	for (uint64_t *at = (uint64_t *)memory; at < (uint64_t *)(memory + pages * PAGE); at++)
		*at = next_random(&state);
	pthread_create(&thread, NULL, look, NULL);
	for (uint64_t i = 0; rate && i < threads; i++)
		pthread_create(&thread, NULL, write_pages, (void *)(uintptr_t)i);
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		uint64_t answer = 0;

		if (!strcmp(line, "reset\n")) {
			atomic_store(&longest, 0);
			atomic_store(&longest_write, 0);
		} else if (!strcmp(line, "longest\n")) {
			answer = atomic_load(&longest);
		} else if (!strcmp(line, "write\n")) {
			answer = atomic_load(&longest_write);
		} else if (!strcmp(line, "fork\n")) {
			answer = time_of_fork();
		} else if (!strncmp(line, "touch ", 6)) {
			uint64_t wanted = strtoull(line + 6, NULL, 10);

			for (uint64_t i = 0; i < wanted; i++, touched++)
				*(uint64_t *)(memory + touched * 7919 % pages * PAGE) = now();
		}
		printf("%lu\n", (unsigned long)answer);
		fflush(stdout);
	}
	return 0;
}
