/* SPDX-License-Identifier: MIT */
/*
 * Pages on their way to a file: one thread puts them in, and a thread of the ring, which lets others
 * go first, writes them.
 *
 * The one that puts them in never waits for the disk longer than it wants to.
 */
#ifndef UFFD_SNAPSHOT_RING_H
#define UFFD_SNAPSHOT_RING_H

#include <stdatomic.h>
#include <stdint.h>

struct uffd_ring;

/* What the writer makes of a page's state. */
#define UFFD_RING_DATA	3u
#define UFFD_RING_ZERO	4u

int uffd_ring_create(int fd, uint64_t pages, struct uffd_ring **ring_ret);

/*
 * Memory for pages, one behind the other; only until the next call.  -ETIMEDOUT: there was none in
 * time; other errors are those of the writer.  At most a quarter of the ring.
 */
int uffd_ring_reserve(struct uffd_ring *ring, uint64_t pages, uint64_t until_ns, void **memory_ret);

/* Have the reserved pages written at an offset; their states, one byte each, are set then. */
void uffd_ring_commit(struct uffd_ring *ring, uint64_t pages, uint64_t offset,
		      _Atomic uint8_t *states);

/* Write pages at an offset, except zeros, and set their states. */
int uffd_ring_write(int fd, const void *pages, uint64_t count, uint64_t offset,
		    _Atomic uint8_t *states);
/* Memory that is there from the beginning, and in no fork of this process; NULL: there is none. */
void *uffd_ring_memory(uint64_t pages);

/* Pages that are not in use now. */
uint64_t uffd_ring_room(struct uffd_ring *ring);
/* 0, or the error of the writer; `wait`: after all that was committed was written. */
int uffd_ring_error(struct uffd_ring *ring, uint32_t wait);
/* Drop what is not written yet, and free it; may be NULL. */
void uffd_ring_destroy(struct uffd_ring *ring);

#endif /* UFFD_SNAPSHOT_RING_H */
