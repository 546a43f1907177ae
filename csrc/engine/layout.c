// SPDX-License-Identifier: MIT
/*
 * Follow changes of the owner's memory: pages dropped, mappings moved or unmapped,
 * forks.  The leader calls this with the gate closed, so no other thread fills a page
 * until the event has been applied.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "cut.h"
#include "expected.h"
#include "failures.h"
#include "layout.h"
#include "pending.h"
#include "range.h"
#include "registered.h"
#include "report.h"
#include "say.h"
#include "space.h"
#include "stats.h"
#include "vacated.h"
#include "base/clock.h"

/* The first range that overlaps [start, end). */
static struct uffd_range *overlapping(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *range = uffd_table_next(space->table, start);

	return range && range->start < end ? range : NULL;
}

/* The page was dropped while in flight: queue a fault, so that its waiters get zeros. */
static void answer_with_zeros(struct uffd_range *range, uint64_t page)
{
	uint64_t now = uffd_now_ns();
	struct deferred_fault fault = {
		.space = range->space,
		.address = page,
		.since_ns = now,
		.read_ns = now,
	};

	defer_fault(range->space->engine, &fault);
}

static void remove_pages(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *range;

	for (uint64_t at = start; (range = overlapping(space, at, end)); at = range->end) {
		uint64_t page = page_of(range, higher(start, range->start));
		uint64_t stop = lower(end, range->end);

		/* What is dropped before it is served gets its content. */
		if (!is_open(range))
			continue;
		for (; page < stop; page += range->page_size) {
			uint8_t was = UFFD_PAGE_EVICTING;

			/* The first event of a page that we drop is our own. */
			if (atomic_compare_exchange_strong(state_of(range, page), &was,
							   UFFD_PAGE_EVICTED))
				continue;
			was = atomic_exchange(state_of(range, page), UFFD_PAGE_REMOVED);
			if (uffd_page_is_in_flight(was))
				answer_with_zeros(range, page);
			if (was == UFFD_PAGE_CLEAN && preserves(range))
				note_failure(space->engine, page, range->page_size, -ENODATA,
					     UFFD_FAILED_SAVE);
			count(space->engine, COUNTER(removed_pages), 1);
		}
	}
}

/* Copy a part of a range as a piece at `to`; NULL, and noted, if out of memory. */
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
	int r = range ? uffd_table_insert(space->table, range) : 0;

	if (r) {
		note_failure(space->engine, range->start, range->end - range->start, r,
			     UFFD_FAILED_RESOLVE);
		range_free(range);
	}
}

/*
 * Take [start, end) out of the table.  Without memory a piece stays whole, and this is noted:
 * its rest is served on, and nothing faults where it is no longer mapped.
 */
static void cut(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *range;
	struct cut parts;

	while ((range = overlapping(space, start, end))) {
		uint64_t from = higher(start, range->start), stop = lower(end, range->end);
		int r = cut_begin(range, from, stop, &parts);

		if (r == 0)
			cut_finish(&parts);
		else
			note_failure(space->engine, from, stop - from, r, UFFD_FAILED_RESOLVE);
		start = stop;
	}
}

/* Skip the parts that were expected to be unmapped; take the rest out of the table. */
static void unmap_pages(struct uffd_space *space, uint64_t start, uint64_t end)
{
	uint64_t from, to;

	forget_vacated(space, start, end);
	if (!take_expected(space, start, end, &from, &to)) {
		cut(space, start, end);
		unlist_registered(space, start, end);
		return;
	}
	if (start < from)
		unmap_pages(space, start, from);
	if (to < end)
		unmap_pages(space, to, end);
}

/* Pieces in the table at the new addresses were unmapped by the move, or before it. */
static void make_room(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *range;

	for (uint64_t at = start; (range = overlapping(space, at, end));) {
		uint64_t from = higher(at, range->start);

		at = lower(end, range->end);
		expect_unmap(space, from, at);
		cut(space, from, at);
	}
}

/* A piece is put where it is now before it is taken out where it was. */
static void move_pages(struct uffd_space *space, uint64_t from, uint64_t to, uint64_t length)
{
	uint64_t at = from, end = from + length;
	struct uffd_range *range;

	move_registered(space, from, to, length);
	forget_vacated(space, to, to + length);
	move_vacated(space, from, to, length);
	expect_unmap(space, from, end);
	make_room(space, to, to + length);
	while ((range = overlapping(space, at, end))) {
		uint64_t start = higher(at, range->start);

		at = lower(end, range->end);
		insert(space, piece_of(range, start, at, start - from + to));
		note_vacated(range, start, at);
		cut(space, start, at);
	}
}

static int clone_ranges(struct uffd_space *parent, struct uffd_space *child, int states_fd)
{
	struct uffd_range *range, *copy;
	uint64_t states_offset = 0;
	int r = 0;

	for (range = uffd_table_next(parent->table, 0); range && r == 0;
	     range = uffd_table_next(parent->table, range->end)) {
		/* A fork has the same shared pages: dropped in one space is dropped in all. */
		if (!range->pages->clone && range->content->shared) {
			range->pages->clone = uffd_pages_get(range->pages);
		} else if (!range->pages->clone) {
			range->pages->clone = uffd_pages_clone(range->pages, states_fd,
							       states_offset);
			states_offset += uffd_pages_file_length(range->pages->count);
		}
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
	/* The child's ranges hold the clones now. */
	for (range = uffd_table_next(parent->table, 0); range;
	     range = uffd_table_next(parent->table, range->end)) {
		if (range->pages->clone)
			uffd_pages_put(range->pages->clone);
		range->pages->clone = NULL;
	}
	return r;
}

/* The child has the parent's pages as of the fork: fills failed with EAGAIN since then. */
static void follow_fork(struct uffd_space *parent, int fd)
{
	struct uffd_engine *engine = parent->engine;
	struct uffd_space *child = NULL;
	int r = -EBADF, states_fd;

	if (fd >= 0)
		r = space_create(engine, fd, true, parent->layout_events, 0, NEXT_NUMBER,
				 &child);
	if (child) {
		states_fd = report_states_file(parent);
		r = clone_ranges(parent, child, states_fd);
		clone_registered(parent, child);
		clone_vacated(parent, child);
		child->has_left = parent->has_left;
		report_fork(child, states_fd);
		if (states_fd >= 0)
			close(states_fd);
	}

	count(engine, COUNTER(forks), 1);
	engine->forks_followed++;
	if (r == 0)
		r = watch_space(engine, child);
	/*
	 * If the fork cannot be followed, refuse its faults one by one as unserved.
	 * Closing the descriptor would give it zero pages.
	 */
	if (r) {
		note_failure(engine, 0, 0, r, UFFD_FAILED_FORK);
		say_engine_fails(engine, 0, r, UFFD_FAILED_FORK,
				 "the child gets SIGBUS where pages are missing");
	}
}

void apply_layout_event(struct uffd_space *space, const struct uffd_msg *message)
{
	count(space->engine, COUNTER(layout_events), 1);
	switch (message->event) {
	case UFFD_EVENT_REMOVE:
		remove_pages(space, message->arg.remove.start, message->arg.remove.end);
		break;
	case UFFD_EVENT_UNMAP:
		atomic_fetch_add(&space->moves, 1);
		unmap_pages(space, message->arg.remove.start, message->arg.remove.end);
		report_pieces(space);
		break;
	case UFFD_EVENT_REMAP:
		atomic_fetch_add(&space->moves, 1);
		move_pages(space, message->arg.remap.from, message->arg.remap.to,
			   message->arg.remap.len);
		report_pieces(space);
		break;
	case UFFD_EVENT_FORK:
		follow_fork(space, (int)message->arg.fork.ufd);
		break;
	default:
		break;
	}
}

void apply_log(struct uffd_space *space, size_t count)
{
	struct message_log *log = &space->engine->shared->log;
	uint64_t first = atomic_load_explicit(&log->sequence, memory_order_relaxed);

	for (size_t i = 0; i < count; i++) {
		if (!is_layout_event(&log->messages[i]))
			continue;
		space->engine->applying = first + i;
		apply_layout_event(space, &log->messages[i]);
		erase_message(&log->messages[i]);
	}
}
