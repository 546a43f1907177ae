// SPDX-License-Identifier: MIT
/*
 * Memory that mremap(2) with MREMAP_DONTUNMAP has left behind.
 *
 * While no event is unread, a vacated place whose UNMAP event has not come is mapped, if
 * these events are on.  Without them the list of registered memory must be complete: then
 * a place is forgotten when something is registered there anew.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "expected.h"
#include "failures.h"
#include "gate.h"
#include "left.h"
#include "pending.h"
#include "range.h"
#include "registered.h"
#include "report.h"
#include "space.h"
#include "uffd_shim.h"
#include "vacated.h"

/* Whether the place is registered, once the layout does not change; -EAGAIN: it does. */
static int look_at(const struct uffd_range *place, bool *is_left_ret)
{
	struct uffd_space *space = place->space;

	*is_left_ret = false;
	if (atomic_load(&space->gone) ||
	    !(space->layout_events & UFFD_FEATURE_EVENT_UNMAP ||
	      atomic_load(&space->knows_registered)))
		return 0;
	return is_one_mapping(place, place->start, place->start + place->page_size, is_left_ret);
}

/*
 * Whether the page cache of a file is behind private memory.  Then the new place would show
 * a page of zeros that an access to the old one has put into a hole of that file.
 */
static bool has_cache(const struct uffd_range *place)
{
	int64_t done;

	return uffd_shim_continue(place->space->fd, place->start, place->page_size, 0, &done) !=
	       -EINVAL;
}

/* Serve it as a piece: private memory with zeros.  0 or -errno. */
static int serve_left(struct uffd_range *place)
{
	struct uffd_pages *dropped;
	int r;

	if (!place->content->shared) {
		dropped = uffd_pages_create(place->pages->count, UFFD_PAGE_REMOVED);
		if (!dropped)
			return -ENOMEM;
		uffd_pages_put(place->pages);
		place->pages = dropped;
	}
	r = uffd_table_insert(place->space->table, place);
	if (r == 0)
		place->space->has_left = true;
	return r;
}

/*
 * The place is taken off the list when its faults have an answer: before that they are
 * deferred, and otherwise they could be taken for those of a mapping that has grown.
 */
static void take_up(struct uffd_range *place, bool leads)
{
	struct uffd_space *space = place->space;
	struct uffd_engine *engine = space->engine;
	uint64_t start = place->start, end = place->end, from, to;
	bool is_kept = place->content->shared || has_cache(place);
	int r = is_kept ? serve_left(place) : uffd_shim_unregister(space->fd, start, end - start);

	while (take_expected(space, start, end, &from, &to))
		;
	unlink_vacated(place);
	if (!is_kept && leads) {
		forget_faults_in(&engine->deferred, space, start, end);
		forget_faults_in(&engine->strays, space, start, end);
	}
	if (is_kept && r)
		note_failure(engine, start, end - start, r, UFFD_FAILED_RESOLVE);
	if (!is_kept || r)
		range_free(place);
	uffd_shim_wake(space->fd, start, end - start);
	report_pieces(space);
}

bool settle_vacated(struct uffd_space *space, bool leads)
{
	struct uffd_range *place = space->vacated, *next;
	bool is_left, settled = true;

	if (!place)
		return true;
	if (layout_is_changing(space))
		return false;
	for (; place; place = next) {
		int r = look_at(place, &is_left);

		next = place->next_lost;
		if (r == -EAGAIN) {
			settled = false;
		} else if (r == 0 && is_left) {
			take_up(place, leads);
		} else {
			unlink_vacated(place);
			range_free(place);
		}
	}
	return settled;
}

void wake_left(const struct uffd_range *range, uint64_t at, uint64_t end)
{
	struct uffd_space *space = range->space;
	uint64_t offset = content_offset(range, at), past = content_offset(range, end);
	struct uffd_range *other;

	if (!space->has_left || !range->content->shared || at >= end)
		return;
	for (other = uffd_table_next(space->table, 0); other;
	     other = uffd_table_next(space->table, other->end)) {
		uint64_t from = higher(offset, other->origin);
		uint64_t to = lower(past, content_offset(other, other->end));

		if (other != range && other->space == space && other->id == range->id && from < to)
			uffd_shim_wake(space->fd, other->start + (from - other->origin), to - from);
	}
}

void settle_all_vacated(struct uffd_engine *engine)
{
	uint32_t spaces = atomic_load(&engine->next_space);

	for (uint32_t number = 0; number < spaces && atomic_load(&engine->vacated); number++) {
		struct uffd_space *space = space_get(engine, number);

		if (!space)
			continue;
		if (has_vacated(space) && gate_try_close(space)) {
			settle_vacated(space, true);
			gate_leave(space);
		}
		space_put(space);
	}
}
