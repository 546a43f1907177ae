/* SPDX-License-Identifier: MIT */
/* Served pieces of memory: create, find, and free them when no longer in use. */
#ifndef UFFD_ENGINE_RANGE_H
#define UFFD_ENGINE_RANGE_H

#include "core.h"

/*
 * For a reader inside a table: take a hold on the range found there, and leave.  If no
 * hold is free the reader stays inside, and this returns NULL.
 */
static inline struct uffd_hold *leave_with(struct uffd_table *table, unsigned int shard,
					   struct uffd_range *range, uint64_t start, uint64_t end,
					   uint32_t thread_id)
{
	struct uffd_hold *hold =
		uffd_hold_take(&range->space->engine->holds, range, start, end, thread_id);

	if (hold)
		uffd_table_leave(table, shard);
	return hold;
}

static inline void let_go(struct uffd_table *table, unsigned int shard, struct uffd_hold *hold)
{
	if (hold)
		uffd_hold_release(hold);
	else
		uffd_table_leave(table, shard);
}

/* For a range out of the table: free it, now or when it is no longer in use. */
void range_discard(struct uffd_range *range);
/* Take it out of the table and discard it. */
void range_remove(struct uffd_range *range);
/* For a range out of the table: whether a thread is still at it. */
bool range_is_in_use(struct uffd_range *range);

struct uffd_range *range_create(struct uffd_space *space, const struct uffd_range *like,
				uint64_t start, uint64_t end, uint64_t origin);
void range_free(struct uffd_range *range);
/* The piece of a range that holds an offset; `hint`: its expected address. */
struct uffd_range *find_piece(struct uffd_space *space, uint64_t id, uint64_t offset,
			      uint64_t hint);
struct uffd_range *any_piece(struct uffd_space *space, uint64_t id, uint64_t hint);
/* A piece of a range that has some of [offset, end). */
struct uffd_range *piece_in(struct uffd_space *space, uint64_t id, uint64_t offset, uint64_t end,
			    uint64_t hint);

#endif /* UFFD_ENGINE_RANGE_H */
