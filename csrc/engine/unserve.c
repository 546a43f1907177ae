// SPDX-License-Identifier: MIT
/*
 * Take ranges, or parts of them, out.  A part is cut out of its piece: what is left of the
 * piece replaces it in the table in one step, so that no fault there finds nothing.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "alloc.h"
#include "barrier.h"
#include "cut.h"
#include "failures.h"
#include "gate.h"
#include "grown.h"
#include "inline.h"
#include "left.h"
#include "range.h"
#include "registered.h"
#include "report.h"
#include "seal.h"
#include "slices.h"
#include "space.h"
#include "spaces.h"
#include "uffd_shim.h"
#include "unserve.h"
#include "vacated.h"

/* What to take out of a range: offsets. */
struct span {
	uint64_t offset, end;
};

static const struct span WHOLE = { 0, UINT64_MAX };

static bool is_part(const struct span *span)
{
	return span->end != WHOLE.end;
}

static bool look_at_piece(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			  const struct span *span, struct piece *piece)
{
	struct uffd_range *range;
	struct access access;

	if (!open_access(engine, ref->space, &access))
		return false;
	range = piece_in(access.space, ref->id, span->offset, span->end, ref->start + span->offset);
	if (range)
		*piece = (struct piece){
			.ref = { ref->space, range->id, range->start - range->origin },
			.offset = higher(range->origin, span->offset),
			.end = lower(range->origin + range->end - range->start, span->end),
			.page_size = range->page_size,
			.mode = range->mode,
			.can_poison = has_ioctl(range, _UFFDIO_POISON),
			.asks = needs_requests(range),
			.preserves = preserves(range),
			.loses_content = loses_content(range),
		};
	close_access(&access);
	return range;
}

static int unregister(struct uffd_range *range, uint64_t from, uint64_t stop)
{
	struct uffd_space *space = range->space;

	if (stop == range->end)
		unregister_grown(range);
	/* ENOMEM also means that the process is gone; EINVAL, that the memory is gone. */
	if (uffd_shim_unregister(space->fd, from, stop - from) == -ENOMEM && !space_is_dead(space))
		return -ENOMEM;
	/* Linux wakes only those that wait for a missing page. */
	uffd_shim_wake(space->fd, from, stop - from);
	unlist_registered(space, from, stop);
	return 0;
}

static void note_taken_out(const struct uffd_engine *engine)
{
	if (engine->options.is_inline)
		inline_note_taken_out();
}

/* Take [from, stop) out of a piece; after an error all of it is still served. */
static int cut_out(struct uffd_range *range, uint64_t from, uint64_t stop, bool unregisters)
{
	struct cut cut;
	int r = cut_begin(range, from, stop, &cut);

	if (r)
		return r;
	if (unregisters)
		r = unregister(range, from, stop);
	if (r) {
		cut_cancel(&cut);
		return r;
	}
	note_taken_out(range->space->engine);
	cut_finish(&cut);
	return 0;
}

/* `last_ret`: nothing else is left to be taken out in this space. */
static int drop_piece(struct uffd_space *space, const struct piece *piece, const struct span *span,
		      bool unregisters, bool *last_ret)
{
	struct uffd_range *range = find_piece(space, piece->ref.id, piece->offset,
					      piece->ref.start + piece->offset);
	uint64_t from, stop;
	int r = 0;

	*last_ret = false;
	if (!range)
		return 0;
	/* It may have been cut meanwhile: take out no more than what was sealed. */
	from = range->start + (piece->offset - range->origin);
	stop = lower(range->end, from + (piece->end - piece->offset));
	*last_ret = !space->has_left && (atomic_load(&range->pages->references) == 1 ||
					 (piece->offset == span->offset &&
					  piece->offset + (stop - from) == span->end));
	settle_failures(range, content_offset(range, from), content_offset(range, stop));
	if (from > range->start || stop < range->end) {
		*last_ret = *last_ret && is_part(span);
		r = cut_out(range, from, stop, unregisters);
	} else {
		r = unregisters ? unregister(range, from, stop) : 0;
		if (r == 0) {
			note_taken_out(space->engine);
			range_remove(range);
		}
	}
	if (r == 0 && is_part(span))
		report_pieces(space);
	return r;
}

static int close_and_drop(struct uffd_engine *engine, const struct piece *piece,
			  const struct span *span, bool unregisters, struct patience *patience,
			  bool *last_ret)
{
	struct uffd_space *space = space_get(engine, piece->ref.space);
	int r;

	*last_ret = true;
	if (!space)
		return 0;
	while (!gate_try_close(space)) {
		if (wait_on(patience))
			continue;
		if (!ends(engine)) {
			space_put(space);
			return -EBUSY;
		}
		engine->end.ignores_gate = true;
	}
	pthread_mutex_lock(&engine->drop_lock);
	r = drop_piece(space, piece, span, unregisters, last_ret);
	pthread_mutex_unlock(&engine->drop_lock);
	gate_leave(space);
	space_put(space);
	return r;
}

static void mark_as_staying(struct uffd_engine *engine, const struct piece *piece)
{
	struct uffd_range *range;
	struct access access;

	if (!open_access(engine, piece->ref.space, &access))
		return;
	range = any_piece(access.space, piece->ref.id, piece->ref.start + piece->offset);
	if (range)
		range->stays = true;
	close_access(&access);
}

/* Take out what overlaps a span, piece by piece. */
static int unserve_span(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			const struct span *span, uint32_t flags, struct patience *patience)
{
	struct piece piece;
	bool last;
	int r = 0;

	do {
		if (!look_at_piece(engine, ref, span, &piece))
			break;
		if (flags & UFFD_UNSERVE_SEAL)
			r = seal_piece(engine, &piece, patience);
		else if (flags & UFFD_UNSERVE_UNREGISTER)
			r = seal_in_flight(engine, &piece, patience);
		if (r == -ENOENT || r == -ESRCH)
			r = 0;
		uffd_barrier(UFFD_BARRIER_UNSERVE_SEALED);
		if (r == 0)
			r = close_and_drop(engine, &piece, span, flags & UFFD_UNSERVE_UNREGISTER,
					   patience, &last);
		if (r && ends(engine))
			mark_as_staying(engine, &piece);
		if (r)
			return r;
	} while (!last);
	if (!is_part(span))
		report_dropped(engine, ref->space, ref->id);
	return 0;
}

int unserve_in(struct uffd_engine *engine, const struct uffd_range_ref *ref, uint32_t flags,
	       struct patience *patience)
{
	return unserve_span(engine, ref, &WHOLE, flags, patience);
}

static void settle_moves_in(struct uffd_space *space, struct patience *patience)
{
	struct uffd_engine *engine = space->engine;
	bool settled = false;

	while (!settled && has_vacated(space)) {
		if (gate_try_close(space)) {
			settled = settle_vacated(space, ends(engine) && engine->end.leads);
			gate_leave(space);
		}
		if (!settled && !wait_on(patience))
			break;
	}
}

void settle_moves(struct uffd_engine *engine, struct patience *patience)
{
	uint32_t spaces = atomic_load(&engine->next_space);

	for (uint32_t number = 0; number < spaces && atomic_load(&engine->vacated); number++) {
		struct uffd_space *space = space_get(engine, number);

		if (!space)
			continue;
		settle_moves_in(space, patience);
		space_put(space);
	}
}

static int unserve(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		   const struct span *span, uint32_t flags, uint64_t patience_ns)
{
	struct patience patience = {
		.engine = engine,
		.left_ns = (int64_t)patience_ns,
		.is_gentle = flags & UFFD_UNSERVE_GENTLY,
	};
	uint32_t *forks;
	size_t found;
	int r, other;

	settle_moves(engine, &patience);
	r = unserve_span(engine, ref, span, flags, &patience);

	/* Afterwards, as a thread may have forked meanwhile. */
	other = list_forks(engine, &forks, &found);
	r = r ? r : other;
	/* Memory that goes away here lives on in a fork. */
	while (found--) {
		struct uffd_range_ref there = { forks[found], ref->id, ref->start };

		other = unserve_span(engine, &there, span, flags | UFFD_UNSERVE_SEAL, &patience);
		r = r ? r : other;
	}
	uffd_free(forks);
	free_lost(engine);
	return r;
}

int uffd_engine_unserve(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			uint32_t flags, uint64_t patience_ns)
{
	return unserve(engine, ref, &WHOLE, flags, patience_ns);
}

int uffd_engine_unserve_part(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			     uint64_t offset, uint64_t length, uint32_t flags,
			     uint64_t patience_ns)
{
	return unserve(engine, ref, &(struct span){ offset, offset + length }, flags, patience_ns);
}
