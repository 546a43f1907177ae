// SPDX-License-Identifier: MIT
/* Served pieces of memory: create, find, and free them when no longer in use. */
#define _GNU_SOURCE
#include "alloc.h"
#include "range.h"

struct uffd_range *range_create(struct uffd_space *space, const struct uffd_range *like,
				uint64_t start, uint64_t end, uint64_t origin)
{
	struct uffd_range *range = uffd_alloc(sizeof(*range));

	if (!range)
		return NULL;
	range->start = start;
	range->end = end;
	range->origin = origin;
	range->page_size = like->page_size;
	range->page_shift = like->page_shift;
	range->mode = like->mode;
	atomic_store(&range->ioctls, atomic_load(&like->ioctls));
	range->id = like->id;
	range->is_left = like->is_left;
	range->space = space;
	range->content = uffd_content_get(like->content);
	range->pages = uffd_pages_get(like->pages);
	atomic_store(&range->readahead_at, start);
	return range;
}

void range_free(struct uffd_range *range)
{
	uffd_content_put(range->content);
	uffd_pages_put(range->pages);
	uffd_free(range);
}

bool range_is_in_use(struct uffd_range *range)
{
	struct uffd_engine *engine = range->space->engine;

	return uffd_hold_is_on(&engine->holds, range) ||
	       (range->has_readers && !uffd_table_is_quiet(range->space->table));
}

void range_discard(struct uffd_range *range)
{
	struct uffd_engine *engine = range->space->engine;

	if (!range_is_in_use(range)) {
		range_free(range);
		return;
	}
	atomic_fetch_add(&range->space->references, 1);
	pthread_mutex_lock(&engine->lost_lock);
	range->next_lost = engine->lost;
	engine->lost = range;
	pthread_mutex_unlock(&engine->lost_lock);
}

void range_remove(struct uffd_range *range)
{
	range->has_readers = !uffd_table_remove(range->space->table, range);
	range_discard(range);
}

static bool has_some_of(const struct uffd_range *range, const struct uffd_space *space, uint64_t id,
			uint64_t offset, uint64_t end)
{
	return range && range->space == space && range->id == id && range->origin < end &&
	       range->origin + (range->end - range->start) > offset;
}

struct uffd_range *piece_in(struct uffd_space *space, uint64_t id, uint64_t offset, uint64_t end,
			    uint64_t hint)
{
	struct uffd_range *range = uffd_table_find(space->table, hint), *left = NULL;

	if (has_some_of(range, space, id, offset, end) && !range->is_left)
		return range;
	/* Moved since: a linear search, rare.  What was left behind comes last. */
	for (range = uffd_table_next(space->table, 0); range;
	     range = uffd_table_next(space->table, range->end)) {
		if (!has_some_of(range, space, id, offset, end))
			continue;
		if (!range->is_left)
			return range;
		left = left ? left : range;
	}
	return left;
}

struct uffd_range *find_piece(struct uffd_space *space, uint64_t id, uint64_t offset,
			      uint64_t hint)
{
	return piece_in(space, id, offset, offset + 1, hint);
}

struct uffd_range *any_piece(struct uffd_space *space, uint64_t id, uint64_t hint)
{
	return piece_in(space, id, 0, UINT64_MAX, hint);
}
