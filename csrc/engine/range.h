/* SPDX-License-Identifier: MIT */
/* Pieces of memory that are served: made, found, and freed when nobody is at them. */
#ifndef UFFD_ENGINE_RANGE_H
#define UFFD_ENGINE_RANGE_H

#include "core.h"

/*
 * Between entering and leaving a table: take hold of what was found there, and
 * leave.  Where no hold is to be had the reader stays inside.
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

/* Out of the table: free it, now or when nobody is at it any more. */
void range_discard(struct uffd_range *range);
/* Take it out, too. */
void range_remove(struct uffd_range *range);
/* Out of the table, too: whether somebody is at it still. */
bool range_is_in_use(struct uffd_range *range);

struct uffd_range *range_create(struct uffd_space *space, const struct uffd_range *like,
				uint64_t start, uint64_t end, uint64_t origin);
void range_free(struct uffd_range *range);
/* The piece of a serving that holds an offset; `hint` is where it was. */
struct uffd_range *find_piece(struct uffd_space *space, uint64_t id, uint64_t offset,
			      uint64_t hint);
struct uffd_range *any_piece(struct uffd_space *space, uint64_t id, uint64_t hint);

#endif /* UFFD_ENGINE_RANGE_H */
