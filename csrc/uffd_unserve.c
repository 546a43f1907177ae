// SPDX-License-Identifier: MIT
/* Taking ranges out: what is absent is poisoned first, since it would be zeros. */
#define _GNU_SOURCE
#include <errno.h>

#include "uffd_alloc.h"
#include "uffd_engine_internal.h"

static uint64_t poison_slice(struct uffd_range *range, uint64_t at, uint64_t end, int *error_ret,
			     uint64_t *done_ret)
{
	struct uffd_fill_result result;
	uint64_t stop = at;
	uint8_t expected = UFFD_PAGE_ABSENT;
	uint64_t past;

	*error_ret = 0;
	/*
	 * Where forks share the memory they share the states, but a mark is in one
	 * address space alone: what is poisoned elsewhere is poisoned here too.
	 */
	if (range->content->shared && atomic_load(state_of(range, at)) == UFFD_PAGE_POISONED)
		expected = UFFD_PAGE_POISONED;
	while (stop < end && atomic_compare_exchange_strong(state_of(range, stop), &expected,
							    UFFD_PAGE_IN_FLIGHT))
		stop += range->page_size;
	if (stop == at && uffd_page_is_in_flight(expected)) {
		*error_ret = -EAGAIN;
		return at;
	}
	if (stop == at)
		return at + range->page_size;
	*error_ret = poison_pages(range, at, stop - at, &result);
	past = at + result.done + result.already_present;
	set_states(range, at, past, UFFD_PAGE_POISONED);
	wake_again(range, at, past);
	unclaim(range, past, stop, UFFD_PAGE_ABSENT);
	if (*error_ret == 0 && result.deferred)
		*error_ret = -EAGAIN;
	*done_ret = result.done;
	return past;
}

static uint64_t unprotect_slice(struct uffd_range *range, uint64_t at, uint64_t end,
				int *error_ret, uint64_t *done_ret)
{
	*done_ret = 0;
	*error_ret = uffd_shim_writeprotect(range->space->fd, at, end - at, 0);
	return *error_ret ? at : end;
}

struct piece {
	uint64_t start, offset, end, mode;
	bool loses_content, can_poison, preserves;
	uint64_t pages_left;
};

static bool look_at_piece(struct uffd_engine *engine, uint32_t number, uint64_t id,
			  uint64_t hint, struct piece *piece)
{
	struct uffd_range *range;
	struct visit visit;

	if (!open_visit(engine, number, &visit))
		return false;
	range = any_piece(visit.space, id, hint);
	if (range)
		*piece = (struct piece){
			.start = range->start - range->origin,
			.offset = range->origin,
			.end = range->origin + range->end - range->start,
			.mode = range->mode,
			.can_poison = has_ioctl(range, _UFFDIO_POISON),
			.preserves = range->content->preserve,
			.loses_content = can_be_absent(range) &&
					 range->content->kind != UFFD_SOURCE_ZERO &&
					 range->content->kind != UFFD_SOURCE_NONE,
		};
	shut_visit(&visit);
	return range;
}

/* Errors do not stop it: the owner may be gone, and the range goes in any case. */
static int seal_piece(struct uffd_engine *engine, uint32_t number, uint64_t id,
		      const struct piece *piece)
{
	uint64_t ignored;
	int r = 0;

	if (piece->preserves)
		r = for_slices(engine, number, id, piece->start, piece->offset, piece->end,
			       preserve_slice, &ignored);
	if (r == 0 && piece->mode & UFFDIO_REGISTER_MODE_WP)
		r = for_slices(engine, number, id, piece->start, piece->offset, piece->end,
			       unprotect_slice, &ignored);
	if (r == 0 && piece->loses_content && piece->can_poison)
		r = for_slices(engine, number, id, piece->start, piece->offset, piece->end,
			       poison_slice, &ignored);
	else if (r == 0 && piece->loses_content)
		r = uffd_engine_populate(engine, number, id, piece->start, piece->offset,
					 piece->end - piece->offset, &ignored);
	return r;
}

/* Returns whether it was the serving's last piece in this space. */
static bool drop_piece(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t hint,
		       bool unregister)
{
	struct uffd_space *space = space_get(engine, number);
	struct uffd_range *range;
	bool last = true;

	if (!space)
		return true;
	gate_close(space);
	range = any_piece(space, id, hint);
	if (range) {
		last = atomic_load(&range->pages->references) == 1;
		if (unregister)
			uffd_shim_unregister(space->fd, range->start, range->end - range->start);
		uffd_table_remove(space->table, range);
		range_free(range);
	}
	gate_leave(space);
	space_put(space);
	return last;
}

static int unserve_in(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t start,
		      uint32_t flags)
{
	struct piece piece;
	int r, result = 0;

	do {
		if (!look_at_piece(engine, number, id, start, &piece))
			break;
		r = flags & UFFD_UNSERVE_SEAL ? seal_piece(engine, number, id, &piece) : 0;
		if (r && r != -ENOENT && r != -ESRCH)
			result = r;
		uffd_barrier(UFFD_BARRIER_UNSERVE_SEALED);
	} while (!drop_piece(engine, number, id, piece.start + piece.offset,
			     flags & UFFD_UNSERVE_UNREGISTER));
	report_dropped(engine, number, id);
	return result;
}

int uffd_engine_unserve(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t start,
			uint32_t flags)
{
	int r = unserve_in(engine, number, id, start, flags), other;
	uint32_t *forks = NULL;
	struct uffd_space *space;
	size_t found = 0;

	pthread_mutex_lock(&engine->spaces_lock);
	if (atomic_load(&engine->space_count) > 1)
		forks = uffd_alloc(atomic_load(&engine->space_count) * sizeof(*forks));
	if (forks)
		LIST_FOREACH(space, &engine->spaces, link)
			if (space->owned)
				forks[found++] = space->number;
	pthread_mutex_unlock(&engine->spaces_lock);
	while (found--) {
		other = unserve_in(engine, forks[found], id, start, flags);
		r = r ? r : other;
	}
	uffd_free(forks);
	return r;
}
