// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "alloc.h"
#include "uffd_abi.h"

/* Blocks of 128 bytes to 64 KiB come from slabs and are kept in lists; larger ones are mapped. */
#define HEADER_SIZE	64u
#define FIRST_SHIFT	7u
#define CLASSES		10u
#define SLAB_SIZE	(256u << 10)
#define MAPPED		UINT32_MAX

struct header {
	uint32_t size_class;	/* or MAPPED */
	size_t mapped_size;
	struct header *next;
};

_Static_assert(sizeof(struct header) <= HEADER_SIZE, "header");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct header *unused[CLASSES];
static _Atomic int64_t until_failure;	/* 0 or less: none fails */

static void *map(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

static void refill(uint32_t size_class)
{
	size_t size = (size_t)1 << (FIRST_SHIFT + size_class);
	char *slab = map(SLAB_SIZE);

	for (size_t at = 0; slab && at + size <= SLAB_SIZE; at += size) {
		struct header *block = (struct header *)(void *)(slab + at);

		block->size_class = size_class;
		block->next = unused[size_class];
		unused[size_class] = block;
	}
}

static struct header *from_slab(uint32_t size_class)
{
	struct header *block;

	pthread_mutex_lock(&lock);
	if (!unused[size_class])
		refill(size_class);
	block = unused[size_class];
	if (block)
		unused[size_class] = block->next;
	pthread_mutex_unlock(&lock);
	return block;
}

static bool is_to_fail(void)
{
	return __builtin_expect(atomic_load_explicit(&until_failure, memory_order_relaxed) > 0,
				0) &&
	       atomic_fetch_sub(&until_failure, 1) == 1;
}

int64_t uffd_alloc_fail_nth(int64_t n)
{
	return atomic_exchange(&until_failure, n);
}

void *uffd_alloc(size_t size)
{
	size_t whole = size + HEADER_SIZE;
	uint32_t size_class = 0;
	struct header *block;

	if (is_to_fail())
		return NULL;
	while (size_class < CLASSES && (size_t)1 << (FIRST_SHIFT + size_class) < whole)
		size_class++;
	if (size_class < CLASSES) {
		block = from_slab(size_class);
		if (block)
			memset((char *)block + HEADER_SIZE, 0, size);
	} else {
		block = map(whole);
		if (block) {
			block->size_class = MAPPED;
			block->mapped_size = whole;
		}
	}
	return block ? (char *)block + HEADER_SIZE : NULL;
}

void uffd_alloc_forget_parent(void)
{
	pthread_mutex_init(&lock, NULL);
	memset(unused, 0, sizeof(unused));
}

void uffd_free(void *memory)
{
	struct header *block = memory ? (struct header *)(void *)((char *)memory - HEADER_SIZE) : NULL;

	if (!block)
		return;
	if (block->size_class == MAPPED) {
		munmap(block, block->mapped_size);
		return;
	}
	pthread_mutex_lock(&lock);
	block->next = unused[block->size_class];
	unused[block->size_class] = block;
	pthread_mutex_unlock(&lock);
}
