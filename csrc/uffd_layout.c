// SPDX-License-Identifier: MIT
/*
 * Following what the owner does to its memory: pages dropped, mappings moved and
 * gone, forks.  The leader calls this inside the space's closed gate, so nobody
 * fills a page meanwhile, and the thread that caused the event goes on only when
 * the next fill may come after it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "uffd_engine_internal.h"

/* The first range that reaches into [start, end), from `start` on. */
static struct uffd_range *overlapping(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *range = uffd_table_next(space->table, start);

	return range && range->start < end ? range : NULL;
}

static uint64_t lower(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t higher(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* Its content is asked for, but it was dropped: whoever waits gets zeros. */
static void answer_with_zeros(struct uffd_range *range, uint64_t page)
{
	struct deferred_fault fault = {
		.space = range->space,
		.address = page,
		.since_ns = uffd_now_ns(),
	};

	defer_fault(range->space->engine, &fault);
}

static void remove_pages(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *range;

	for (uint64_t at = start; (range = overlapping(space, at, end)); at = range->end) {
		uint64_t page = page_of(range, higher(start, range->start));
		uint64_t stop = lower(end, range->end);

		for (; page < stop; page += range->page_size) {
			uint8_t was = atomic_exchange(state_of(range, page), UFFD_PAGE_REMOVED);

			if (was == UFFD_PAGE_IN_FLIGHT)
				answer_with_zeros(range, page);
			if (was == UFFD_PAGE_CLEAN && range->content->preserve)
				note_failure(space->engine, page, range->page_size, -ENODATA,
					     UFFD_FAILED_SOURCE);
			count(space->engine, COUNTER(removed_pages), 1);
		}
	}
}

/* A part of a range as a range of its own, at `to`; NULL and noted when memory is short. */
static struct uffd_range *piece_of(const struct uffd_range *range, uint64_t start, uint64_t end,
				   uint64_t to)
{
	struct uffd_range *piece = range_create(range->space, range, to, to + (end - start),
						content_offset(range, start));

	if (!piece)
		note_failure(range->space->engine, start, end - start, -ENOMEM,
			     UFFD_FAILED_RESOLVE);
	return piece;
}

static void insert(struct uffd_space *space, struct uffd_range *range)
{
	if (!range)
		return;
	if (uffd_table_insert(space->table, range)) {
		note_failure(space->engine, range->start, range->end - range->start, -EEXIST,
			     UFFD_FAILED_RESOLVE);
		range_free(range);
	}
}

/*
 * Take [start, end) out of the table.  What lies there comes back in `moved`, laid
 * out for its new place, unless `moved` is NULL.
 */
#define MOVED_AT_ONCE 64

static size_t cut(struct uffd_space *space, uint64_t start, uint64_t end, uint64_t to,
		  struct uffd_range **moved)
{
	struct uffd_range *range;
	size_t found = 0;

	while (found < MOVED_AT_ONCE && (range = overlapping(space, start, end))) {
		uint64_t from = higher(start, range->start), stop = lower(end, range->end);

		uffd_table_remove(space->table, range);
		if (range->start < from)
			insert(space, piece_of(range, range->start, from, range->start));
		if (stop < range->end)
			insert(space, piece_of(range, stop, range->end, stop));
		if (moved && (moved[found] = piece_of(range, from, stop, from - start + to)))
			found++;
		range_free(range);
	}
	return found;
}

static void move_pages(struct uffd_space *space, uint64_t from, uint64_t to, uint64_t length)
{
	struct uffd_range *moved[MOVED_AT_ONCE];
	size_t found;

	do {
		found = cut(space, from, from + length, to, moved);
		for (size_t i = 0; i < found; i++)
			insert(space, moved[i]);
	} while (found == MOVED_AT_ONCE);
}

static int clone_ranges(struct uffd_space *parent, struct uffd_space *child)
{
	struct uffd_range *range, *copy;
	int r = 0;

	for (range = uffd_table_next(parent->table, 0); range && r == 0;
	     range = uffd_table_next(parent->table, range->end)) {
		/* Shared memory is one memory: dropped for one is dropped for all. */
		if (!range->pages->clone)
			range->pages->clone = range->content->shared
				? uffd_pages_get(range->pages) : uffd_pages_clone(range->pages);
		copy = range->pages->clone
			? range_create(child, range, range->start, range->end, range->origin)
			: NULL;
		if (!copy) {
			r = -ENOMEM;
			break;
		}
		uffd_pages_put(copy->pages);
		copy->pages = uffd_pages_get(range->pages->clone);
		r = uffd_table_insert(child->table, copy);
		if (r)
			range_free(copy);
	}
	/* The ranges of the copy hold the clones now. */
	for (range = uffd_table_next(parent->table, 0); range;
	     range = uffd_table_next(parent->table, range->end)) {
		if (range->pages->clone)
			uffd_pages_put(range->pages->clone);
		range->pages->clone = NULL;
	}
	return r;
}

/* The child has what the parent had at the fork: EAGAIN kept it still since then. */
static void follow_fork(struct uffd_space *parent, int fd)
{
	struct uffd_engine *engine = parent->engine;
	struct uffd_space *child = space_create(engine, fd, true, true);
	int r = child ? clone_ranges(parent, child) : -ENOMEM;

	count(engine, COUNTER(forks), 1);
	engine->forks_followed++;
	if (r == 0)
		r = watch_space(engine, child);
	/*
	 * Not followed, its faults are refused one by one as unserved.  Closing
	 * the descriptor would give it zero pages.
	 */
	if (r)
		note_failure(engine, 0, 0, r, UFFD_FAILED_FORK);
}

void apply_layout_event(struct uffd_space *space, const struct uffd_msg *message)
{
	count(space->engine, COUNTER(layout_events), 1);
	switch (message->event) {
	case UFFD_EVENT_REMOVE:
		remove_pages(space, message->arg.remove.start, message->arg.remove.end);
		break;
	case UFFD_EVENT_UNMAP:
		cut(space, message->arg.remove.start, message->arg.remove.end, 0, NULL);
		break;
	case UFFD_EVENT_REMAP:
		move_pages(space, message->arg.remap.from, message->arg.remap.to,
			   message->arg.remap.len);
		break;
	case UFFD_EVENT_FORK:
		follow_fork(space, (int)message->arg.fork.ufd);
		break;
	default:
		break;
	}
}
