/* SPDX-License-Identifier: MIT */
/*
 * The ordered table of served ranges: binary search without a lock, from any
 * thread and from a signal handler.
 *
 * Writers hold a mutex and bump a sequence count around their change, with all
 * signals blocked, so that a signal handler never waits for the thread it
 * interrupted.  A range that was taken out is freed once no reader is inside:
 * readers count themselves in and out on one cache line per CPU.
 */
#ifndef UFFD_TABLE_H
#define UFFD_TABLE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "content.h"

#define UFFD_SHARDS 64

struct uffd_space;

/* A served piece of memory: a whole range, or a part of one. */
struct uffd_range {
	uint64_t start;
	uint64_t end;
	uint64_t page_size;
	uint32_t page_shift;
	uint64_t mode;			/* UFFDIO_REGISTER_MODE_* */
	_Atomic uint64_t ioctls;	/* 0: it is closed, see open.h */
	uint64_t id;			/* of the range it belongs to; never reused */
	uint64_t origin;		/* offset of `start` in the range as it was served */
	struct uffd_space *space;
	struct uffd_content *content;
	struct uffd_pages *pages;

	_Atomic uint64_t readahead_at;	/* a fault here is sequential */
	_Atomic uint32_t readahead_chunks;
	/* The huge page for which a fill last said EEXIST, when, and how often. */
	_Atomic uint64_t exists_at;
	_Atomic uint64_t exists_occasion;
	_Atomic uint32_t exists_count;

	struct uffd_range *next_lost;	/* once out of the table but still in use */
	bool has_readers;		/* readers did not leave when it was taken out */
	bool stays;			/* registered after the end: it could not be sealed */
	bool is_left;			/* where it was before it was moved, see left.h */
};

struct uffd_table_shard {
	_Alignas(64) _Atomic long readers;
};

struct uffd_table {
	pthread_mutex_t lock;
	_Atomic uint64_t sequence;
	_Atomic size_t count;
	size_t capacity;
	size_t reserved;		/* entries that uffd_table_replace() will add */
	_Atomic(uint64_t *) starts;
	_Atomic(struct uffd_range **) ranges;
	void *outgrown;			/* old arrays that a reader may still use */
	_Atomic bool is_held_up;	/* readers did not leave in time */
	struct uffd_table_shard shards[UFFD_SHARDS];
};

#define UFFD_TABLE_INIT { .lock = PTHREAD_MUTEX_INITIALIZER }

void uffd_table_init(struct uffd_table *table);
void uffd_table_deinit(struct uffd_table *table);

/* Returns 0, -EEXIST if the range overlaps one in the table, or -ENOMEM. */
int uffd_table_insert(struct uffd_table *table, struct uffd_range *range);

/*
 * Take a range out and wait until no reader can have it; the caller frees it.  Returns
 * false if a reader does not leave, which happens only if more threads are blocked than
 * there are holds (hold.h): then do not free the range.
 */
bool uffd_table_remove(struct uffd_table *table, struct uffd_range *range);
/*
 * Put `count` parts of a range, 0 to 2 and in order, in its place, in one step: a search
 * finds the range or the parts.  Two parts need a reservation, which they use up; returns
 * as uffd_table_remove().
 */
bool uffd_table_replace(struct uffd_table *table, struct uffd_range *range,
			struct uffd_range *const *parts, size_t count);
/* Room for the entry that a replacement may add: 0 or -ENOMEM. */
int uffd_table_reserve(struct uffd_table *table);
void uffd_table_unreserve(struct uffd_table *table);
/* Whether all readers that were inside at the call have left; does not wait. */
bool uffd_table_is_quiet(struct uffd_table *table);

/* A reader may use what it finds until it leaves.  Returns the shard to leave. */
static inline unsigned int uffd_table_enter(struct uffd_table *table, unsigned int cpu)
{
	unsigned int shard = cpu % UFFD_SHARDS;

	atomic_fetch_add(&table->shards[shard].readers, 1);
	return shard;
}

static inline void uffd_table_leave(struct uffd_table *table, unsigned int shard)
{
	atomic_fetch_sub_explicit(&table->shards[shard].readers, 1, memory_order_release);
}

/* The range that holds the address, or NULL.  Call between enter and leave. */
struct uffd_range *uffd_table_find(struct uffd_table *table, uint64_t address);

/* The last range that starts at or before the address, or NULL.  Call as above. */
struct uffd_range *uffd_table_before(struct uffd_table *table, uint64_t address);

/* The first range that ends behind the address, or NULL.  For writers of the table. */
struct uffd_range *uffd_table_next(struct uffd_table *table, uint64_t address);

#endif /* UFFD_TABLE_H */
