// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "base/gentle.h"
#include "base/page.h"
#include "base/threads.h"
#include "snapshot/ring.h"
#include "uffd_transfer.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* the build machine's headers may be older */
#endif

struct entry {
	uint64_t first;
	uint64_t pages;
	uint64_t skipped; /* at the end of the memory, before this one */
	uint64_t offset;
	_Atomic uint8_t *states;
};

struct uffd_ring {
	pthread_t writer;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int fd;
	char *memory;
	uint64_t capacity;
	/* Page numbers that only grow; used: [tail, head). */
	uint64_t head, tail;
	struct entry *entries;
	uint64_t first_entry, last_entry;
	uint64_t reserved, skipped;
	bool stop;
	int error;
};

static bool is_zero(const char *page)
{
	static const char zeros[BASE_PAGE];

	return !memcmp(page, zeros, BASE_PAGE);
}

int uffd_ring_write(int fd, const void *pages, uint64_t count, uint64_t offset,
		    _Atomic uint8_t *states)
{
	const char *from = pages;
	int ret = 0;

	for (uint64_t i = 0; !ret && i < count;) {
		bool zero = is_zero(from + i * BASE_PAGE);
		uint64_t stop = i + 1, done = 0;

		while (stop < count && is_zero(from + stop * BASE_PAGE) == zero)
			stop++;
		if (!zero)
			do
				ret = uffd_transfer_write(fd, (int64_t)(offset + i * BASE_PAGE),
							  from + i * BASE_PAGE,
							  (stop - i) * BASE_PAGE, &done);
			while (ret == -EINTR);
		for (; !ret && i < stop; i++)
			atomic_store(&states[i], zero ? UFFD_RING_ZERO : UFFD_RING_DATA);
	}
	return ret;
}

static void *write_all(void *argument)
{
	struct uffd_ring *ring = argument;

	prctl(PR_SET_NAME, "uffd-write");
	uffd_be_gentle();
	pthread_mutex_lock(&ring->lock);
	while (!ring->stop) {
		struct entry entry;
		int ret;

		if (ring->first_entry == ring->last_entry || ring->error) {
			pthread_cond_wait(&ring->changed, &ring->lock);
			continue;
		}
		entry = ring->entries[ring->first_entry % ring->capacity];
		pthread_mutex_unlock(&ring->lock);
		ret = uffd_ring_write(ring->fd, ring->memory + entry.first * BASE_PAGE, entry.pages,
				      entry.offset, entry.states);
		pthread_mutex_lock(&ring->lock);
		ring->first_entry++;
		ring->tail += entry.pages + entry.skipped;
		if (ret)
			ring->error = ret;
		pthread_cond_broadcast(&ring->changed);
	}
	pthread_mutex_unlock(&ring->lock);
	return NULL;
}

/* Have the memory now, not when a fault waits; huge pages need a tenth of the time. */
static void populate(char *memory, uint64_t length)
{
	madvise(memory, length, MADV_HUGEPAGE);
	if (madvise(memory, length, MADV_POPULATE_WRITE))
		for (uint64_t at = 0; at < length; at += BASE_PAGE) /* before Linux 5.14 */
			((volatile char *)memory)[at] = 0;
}

void *uffd_ring_memory(uint64_t pages)
{
	void *memory = mmap(NULL, pages * BASE_PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	/* If a child had it too, each page would be copied before its first use here. */
	madvise(memory, pages * BASE_PAGE, MADV_DONTFORK);
	populate(memory, pages * BASE_PAGE);
	return memory;
}

int uffd_ring_create(int fd, uint64_t pages, struct uffd_ring **ring_ret)
{
	struct uffd_ring *ring = calloc(1, sizeof(*ring));
	int ret;

	*ring_ret = NULL;
	if (!ring)
		return -ENOMEM;
	ring->fd = fd;
	ring->capacity = pages;
	ring->entries = calloc(pages, sizeof(*ring->entries));
	ring->memory = uffd_ring_memory(pages);
	if (!ring->memory || !ring->entries) {
		if (ring->memory)
			munmap(ring->memory, pages * BASE_PAGE);
		free(ring->entries);
		free(ring);
		return -ENOMEM;
	}
	pthread_mutex_init(&ring->lock, NULL);
	uffd_cond_init(&ring->changed);
	ret = uffd_thread_start(&ring->writer, NULL, write_all, ring);
	if (ret) {
		munmap(ring->memory, pages * BASE_PAGE);
		free(ring->entries);
		free(ring);
		return ret;
	}
	*ring_ret = ring;
	return 0;
}

int uffd_ring_reserve(struct uffd_ring *ring, uint64_t pages, uint64_t until_ns, void **memory_ret)
{
	struct timespec until = { (time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u) };
	uint64_t at, skipped = 0;
	int ret = 0;

	pthread_mutex_lock(&ring->lock);
	at = ring->head % ring->capacity;
	if (at + pages > ring->capacity)
		skipped = ring->capacity - at;
	while (!ret && !ring->error && ring->head + skipped + pages > ring->tail + ring->capacity)
		ret = -pthread_cond_timedwait(&ring->changed, &ring->lock, &until);
	if (ring->error)
		ret = ring->error;
	ring->reserved = pages;
	ring->skipped = skipped;
	*memory_ret = ret ? NULL : ring->memory + (ring->head + skipped) % ring->capacity * BASE_PAGE;
	pthread_mutex_unlock(&ring->lock);
	return ret;
}

void uffd_ring_commit(struct uffd_ring *ring, uint64_t pages, uint64_t offset,
		      _Atomic uint8_t *states)
{
	pthread_mutex_lock(&ring->lock);
	ring->entries[ring->last_entry++ % ring->capacity] = (struct entry){
		.first = (ring->head + ring->skipped) % ring->capacity,
		.pages = pages,
		.skipped = ring->skipped,
		.offset = offset,
		.states = states,
	};
	ring->head += pages + ring->skipped;
	pthread_cond_broadcast(&ring->changed);
	pthread_mutex_unlock(&ring->lock);
}

uint64_t uffd_ring_room(struct uffd_ring *ring)
{
	uint64_t room;

	pthread_mutex_lock(&ring->lock);
	room = ring->capacity - (ring->head - ring->tail);
	pthread_mutex_unlock(&ring->lock);
	return room;
}

int uffd_ring_error(struct uffd_ring *ring, uint32_t wait)
{
	int ret;

	pthread_mutex_lock(&ring->lock);
	while (wait && !ring->error && ring->first_entry != ring->last_entry)
		pthread_cond_wait(&ring->changed, &ring->lock);
	ret = ring->error;
	pthread_mutex_unlock(&ring->lock);
	return ret;
}

void uffd_ring_destroy(struct uffd_ring *ring)
{
	if (!ring)
		return;
	pthread_mutex_lock(&ring->lock);
	ring->stop = true;
	pthread_cond_broadcast(&ring->changed);
	pthread_mutex_unlock(&ring->lock);
	pthread_join(ring->writer, NULL);
	pthread_mutex_destroy(&ring->lock);
	pthread_cond_destroy(&ring->changed);
	munmap(ring->memory, ring->capacity * BASE_PAGE);
	free(ring->entries);
	free(ring);
}
