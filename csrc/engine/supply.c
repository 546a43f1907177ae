// SPDX-License-Identifier: MIT
/*
 * Fill absent pages with content that the caller has, beside faults.
 *
 * A page is filled once, by whoever claims it first.  A page that a worker was asked for
 * is taken from it: its answer, if there is one, finds the page filled.  A page that
 * another thread is filling is waited for, since that thread may give it back.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "barrier.h"
#include "left.h"
#include "promise.h"
#include "put.h"
#include "range.h"
#include "resolve.h"
#include "slices.h"
#include "stats.h"
#include "supply.h"

struct supply {
	uint64_t data;		/* what belongs at `offset` */
	uint64_t offset;
	bool unprotected;
};

enum claimed {
	CLAIMED,
	IS_THERE,
	IS_BUSY,
};

static enum claimed claim_wanted(struct uffd_range *range, uint64_t page, bool *requested)
{
	uint8_t state = atomic_load(state_of(range, page));

	while (state == UFFD_PAGE_ABSENT || state == UFFD_PAGE_REQUESTED) {
		bool was_requested = state == UFFD_PAGE_REQUESTED;

		if (!atomic_compare_exchange_weak(state_of(range, page), &state,
						  UFFD_PAGE_IN_FLIGHT))
			continue;
		*requested |= was_requested;
		return CLAIMED;
	}
	return uffd_page_is_in_flight(state) ? IS_BUSY : IS_THERE;
}

/* The filled pages [at, past) are still claimed: set their states. */
static void settle_filled(struct uffd_range *range, uint64_t at, uint64_t past, bool unprotected,
			  uint64_t turned_away, const struct uffd_fill_result *result)
{
	/* If this fails the pages stay protected, which is harmless. */
	if (unprotected && at < past)
		uffd_shim_writeprotect(range->space->fd, at, past - at, 0);
	if (unprotected)
		set_states(range, at, past, UFFD_PAGE_DIRTY);
	else
		set_filled(range, at, past, result);
	/* That a huge page is there wakes nobody, see fill_of(). */
	if (is_huge(range) && result->already_present)
		wake_again(range, at, past);
	else
		wake_turned_away(range, at, past, turned_away);
	wake_left(range, at, past);
}

static uint64_t supply_slice(const struct slices *all, struct uffd_range *range, uint64_t at,
			     uint64_t end, int *error_ret, uint64_t *done_ret)
{
	uint64_t before = atomic_load(&all->engine->turned_away);
	const struct supply *supply = all->context;
	struct uffd_fill_result result;
	enum claimed claimed = IS_THERE;
	bool requested = false;
	uint64_t stop, past;

	while (at < end && (claimed = claim_wanted(range, at, &requested)) == IS_THERE)
		at += range->page_size;
	if (claimed == IS_BUSY)
		*error_ret = -EAGAIN;
	if (at >= end || claimed == IS_BUSY)
		return at;
	stop = at + range->page_size;
	/* Take huge pages one at a time: is_lacking() is about one. */
	while (stop < end && !is_huge(range) && claim_wanted(range, stop, &requested) == CLAIMED)
		stop += range->page_size;
	uffd_barrier(UFFD_BARRIER_FILL_CLAIMED);
	*error_ret = put_bytes(range, at, stop - at,
			       supply->data + (content_offset(range, at) - supply->offset),
			       FILL_AHEAD, &result);
	uffd_barrier(UFFD_BARRIER_PLACED);
	past = at + result.done + result.already_present;
	if (*error_ret == 0 && result.already_present && is_lacking(range, at)) {
		*error_ret = -ENOMEM;
		past = at;
	} else if (*error_ret == 0 && result.deferred) {
		*error_ret = -EAGAIN;
	}
	settle_filled(range, at, past, supply->unprotected, before, &result);
	unclaim(range, past, stop, UFFD_PAGE_ABSENT);
	if (requested)
		settle_promises(range->space->engine);
	count(range->space->engine, COUNTER(filled_pages), result.done >> range->page_shift);
	if (*error_ret == -ESRCH)
		atomic_store(&range->space->gone, true);
	*done_ret = result.done;
	return past;
}

/* Fault in the pages of `data` that are wanted, outside the gate. */
static uint64_t supply_reach(const struct slices *all, struct uffd_range *range, uint64_t at,
			     uint64_t end, struct reach *reach)
{
	const struct supply *supply = all->context;

	reach->read = supply->data + (content_offset(range, at) - supply->offset);
	reach->read_length = end - at;
	return end;
}

int supply_some(struct uffd_engine *engine, const struct uffd_range_ref *ref, uint64_t offset,
		uint64_t length, const void *data, uint64_t *filled_ret)
{
	struct supply supply = { .data = (uint64_t)(uintptr_t)data, .offset = offset };
	struct slices all = { engine, *ref, offset, offset + length, supply_slice, NULL, &supply,
			      0 };
	int r = 0;

	*filled_ret = 0;
	while (offset < all.end && r == 0) {
		uint64_t done;

		r = do_slice(&all, &offset, &done);
		*filled_ret += done;
	}
	return r;
}

int uffd_engine_fill(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, const void *data, uint32_t unprotected,
		     uint64_t *filled_ret, uint64_t *reached_ret)
{
	struct supply supply = {
		.data = (uint64_t)(uintptr_t)data,
		.offset = offset,
		.unprotected = unprotected,
	};

	return for_slices(&(struct slices){ engine, *ref, offset, offset + length, supply_slice,
					    supply_reach, &supply, 0 },
			  filled_ret, reached_ret);
}
