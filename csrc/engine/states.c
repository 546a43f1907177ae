// SPDX-License-Identifier: MIT
/* Report what is known about pages, also while protecting them again. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "page_table.h"
#include "put.h"
#include "range.h"
#include "runs.h"
#include "slices.h"
#include "space.h"
#include "states.h"
#include "stats.h"
#include "base/clock.h"
#include "uffd_owner.h"

#define PAGES_AT_ONCE	512u
/* Write-protecting part of a transparent huge page splits it. */
#define THP_SIZE	(2u << 20)
/* A page is held for about one ioctl. */
#define HELD_CHECKS	256

/* The state of the page at an index, after a short wait if it is held. */
static uint8_t settled_state(const struct uffd_pages *pages, uint64_t index)
{
	uint8_t state = atomic_load_explicit(&pages->state[index], memory_order_acquire);

	for (unsigned int i = 0; state == UFFD_PAGE_HELD && i < HELD_CHECKS; i++) {
		uffd_back_off(i);
		state = atomic_load_explicit(&pages->state[index], memory_order_acquire);
	}
	return uffd_page_is_in_flight(state) ? UFFD_PAGE_IN_FLIGHT : state;
}

/* The states of `pages` pages of a piece from `at`; `first`: the index of the first. */
static void look(const struct uffd_range *range, uint64_t at, uint64_t first, uint64_t pages,
		 uint8_t *states_ret)
{
	uint64_t entries[PAGES_AT_ONCE];
	bool in_doubt = false;

	for (uint64_t i = 0; i < pages; i++) {
		states_ret[i] = settled_state(range->pages, first + i);
		in_doubt |= states_ret[i] == UFFD_PAGE_ABSENT ||
			    states_ret[i] == UFFD_PAGE_REMOVED ||
			    range->mode & UFFDIO_REGISTER_MODE_WP;
	}
	if (in_doubt && read_entries(range, at, pages, entries))
		for (uint64_t i = 0; i < pages; i++)
			states_ret[i] = seen_state(range, states_ret[i], entries[i]);
}

int uffd_engine_states(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		       uint64_t first_page, uint64_t pages, uint8_t *states_ret)
{
	struct uffd_range *range, *any;
	struct access access;
	int r;

	await_work(engine);
	r = open_piece(engine, ref, &access, &any);
	if (r)
		return r;
	if (first_page + pages > any->pages->count)
		r = -EINVAL;
	for (uint64_t done = 0, n; r == 0 && done < pages; done += n) {
		uint64_t offset = (first_page + done) << any->page_shift, at;

		n = 1;
		range = find_piece(access.space, ref->id, offset, ref->start + offset);
		if (!range) {
			/* No longer mapped. */
			states_ret[done] = settled_state(any->pages, first_page + done);
			continue;
		}
		at = range->start + (offset - range->origin);
		n = lower(lower(pages - done, PAGES_AT_ONCE), (range->end - at) >> range->page_shift);
		look(range, at, first_page + done, n, states_ret + done);
	}
	close_access(&access);
	return r;
}

int uffd_engine_take_in(struct uffd_engine *engine, const struct uffd_range_ref *ref)
{
	struct uffd_range *range;
	struct access access;
	int r = open_piece(engine, ref, &access, &range);

	if (r)
		return r;
	note_present(range);
	close_access(&access);
	return 0;
}

/* Protecting, and lifting the protection */

/* The new state of a page that had this state, after it was protected or unprotected. */
static uint8_t armed_state(const struct uffd_range *range, uint8_t seen, bool is_there,
			   bool protects)
{
	/*
	 * A dropped page stays so, unless it is there, unprotected: it may have been
	 * written to.
	 */
	if (seen == UFFD_PAGE_REMOVED && can_be_absent(range) && (protects || !is_there))
		return seen;
	return protects ? UFFD_PAGE_CLEAN : UFFD_PAGE_DIRTY;
}

static bool is_left_alone(uint8_t state)
{
	return state == UFFD_PAGE_ABSENT || state == UFFD_PAGE_POISONED ||
	       state == UFFD_PAGE_REQUESTED;
}

/* Hold pages from `at` on; absent pages need no hold, as they arrive protected. */
static uint64_t hold_run(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t *states,
			 bool *held)
{
	uint64_t pages = 0;

	for (; at < end; at += range->page_size, pages++) {
		uint8_t state = atomic_load(state_of(range, at));

		held[pages] = !is_left_alone(state);
		/* Another thread is at it, or has just changed it: stop here. */
		if (held[pages] &&
		    (uffd_page_is_in_flight(state) ||
		     !atomic_compare_exchange_strong(state_of(range, at), &state, UFFD_PAGE_HELD)))
			break;
		states[pages] = state;
	}
	return pages;
}

static uint8_t without_mark(uint8_t state)
{
	return state & ~UFFD_PAGE_WRITTEN;
}

/* The source of a page in flight is still asked for it: what was noted stays so. */
static bool says_written(uint8_t state)
{
	return state == UFFD_PAGE_DIRTY || state == UFFD_PAGE_REMOVED ||
	       state == UFFD_PAGE_POISONED;
}

/*
 * The states are about to say that the pages are clean: note what was written for the next
 * checkpoint, or take what was noted.  A writer, or eviction, comes after that.
 */
static void settle_written(struct uffd_range *range, uint64_t at, uint64_t pages, uint32_t how,
			   uint8_t *states)
{
	uint64_t first = content_offset(range, at) >> range->page_shift;
	struct uffd_pages *known = range->pages;

	for (uint64_t i = 0; how == UFFD_PROTECT_TO_EVICT && i < pages; i++)
		if (states[i] == UFFD_PAGE_DIRTY || states[i] == UFFD_PAGE_REMOVED)
			uffd_pages_note_written(known, first + i);
	if (how == UFFD_PROTECT_TO_EVICT || !atomic_load(&known->has_written))
		return;
	for (uint64_t i = 0; how == UFFD_PROTECT && i < pages; i++)
		if (says_written(states[i]))
			uffd_pages_take_written(known, first + i);
	for (uint64_t i = 0; how == UFFD_PROTECT_TO_CHECK && i < pages; i++)
		if (uffd_pages_take_written(known, first + i))
			states[i] |= UFFD_PAGE_WRITTEN;
}

/* Pages that others had filled are now protected as well: set their states. */
static void take_in(struct uffd_range *range, uint64_t at, uint64_t pages, bool is_known,
		    uint8_t *states)
{
	uint64_t entries[PAGES_AT_ONCE];

	if (!is_known || !read_entries(range, at, pages, entries))
		return;
	for (uint64_t i = 0; i < pages; i++) {
		uint8_t expected = UFFD_PAGE_ABSENT, now;
		bool was_there = without_mark(states[i]) != UFFD_PAGE_ABSENT;

		now = seen_state(range, UFFD_PAGE_ABSENT, entries[i]);
		if (now != UFFD_PAGE_CLEAN && now != UFFD_PAGE_DIRTY)
			continue;
		if (atomic_compare_exchange_strong(state_of(range, at + (i << range->page_shift)),
						   &expected, UFFD_PAGE_CLEAN) && !was_there)
			states[i] += UFFD_PAGE_DIRTY - UFFD_PAGE_ABSENT;
	}
}

/*
 * Without WP_UNPOPULATED Linux silently does not protect holes of anonymous memory, so
 * read them, which maps the zero page.  -EAGAIN: the memory is being moved.
 */
static int map_holes(const struct uffd_range *range, uint64_t at, uint64_t length)
{
	struct uffd_space *space = range->space;
	int r = -EINVAL;

	if (space->is_here && madvise((void *)(uintptr_t)at, length, UFFD_MADV_POPULATE_READ) == 0)
		return 0;
	if (space->is_here)
		r = -errno;
	/* Before Linux 5.14, or another process's memory. */
	if (r == -EINVAL)
		r = uffd_owner_touch(space->owner_pid, at, length, range->page_size);
	if (r && layout_is_changing(space))
		return -EAGAIN;
	/* No longer mapped: the ioctl reports that. */
	return r == -ENOMEM ? 0 : r;
}

/* Protect [at, past), or lift the protection, and return `past`; `states`: the states before. */
static uint64_t arm_run(struct uffd_range *range, uint64_t at, uint64_t end, uint32_t how,
			uint8_t *states, int *error_ret)
{
	uint64_t entries[PAGES_AT_ONCE], pages, past;
	uint8_t before[PAGES_AT_ONCE];
	bool held[PAGES_AT_ONCE], is_known, has_absent = false, protects = how;

	*error_ret = protects && range->content->maps_holes ? map_holes(range, at, end - at) : 0;
	if (*error_ret)
		return at;
	pages = hold_run(range, at, end, before, held);
	past = at + (pages << range->page_shift);
	*error_ret = pages ? 0 : -EAGAIN;
	if (!pages)
		return at;
	is_known = read_entries(range, at, pages, entries);
	for (uint64_t i = 0; i < pages; i++) {
		states[i] = is_known ? seen_state(range, before[i], entries[i]) : before[i];
		if (states[i] == UFFD_PAGE_REQUESTED)
			states[i] = UFFD_PAGE_IN_FLIGHT;
		has_absent |= before[i] == UFFD_PAGE_ABSENT;
	}
	*error_ret = uffd_shim_writeprotect(range->space->fd, at, past - at,
					    protects ? UFFDIO_WRITEPROTECT_MODE_WP : 0);
	if (*error_ret == 0)
		settle_written(range, at, pages, how, states);
	for (uint64_t i = 0; i < pages; i++) {
		bool is_there = !is_known || has_page(range, entries[i]);

		if (held[i])
			atomic_store(state_of(range, at + (i << range->page_shift)),
				     *error_ret ? before[i]
						: armed_state(range, without_mark(states[i]),
							      is_there, protects));
	}
	if (*error_ret == 0 && protects && has_absent)
		take_in(range, at, pages, is_known, states);
	/* Writers that faulted in the meantime wait for this wake. */
	wake_again(range, at, past);
	return *error_ret ? at : past;
}

static uint64_t run_end(const struct uffd_range *range, uint64_t at, uint64_t end)
{
	uint64_t most = is_huge(range) ? 8 * range->page_size : (at + THP_SIZE) & ~(THP_SIZE - 1ull);

	end = lower(end, range->end);
	return is_huge(range) ? lower(end, at + most) : lower(end, most);
}

/*
 * The error loses the states just read: pages that were not clean become dirty again, and what
 * was taken is noted again.
 */
static void take_back(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		      uint64_t first, uint64_t pages, const uint8_t *states)
{
	struct uffd_range *any;
	struct access access;

	if (!open_access(engine, ref->space, &access))
		return;
	any = any_piece(access.space, ref->id, ref->start);
	for (uint64_t i = 0; any && i < pages; i++) {
		uint8_t expected = UFFD_PAGE_CLEAN;

		if (states[i] & UFFD_PAGE_WRITTEN)
			uffd_pages_note_written(any->pages, first + i);
		if (without_mark(states[i]) != UFFD_PAGE_CLEAN)
			atomic_compare_exchange_strong(&any->pages->state[first + i], &expected,
						       UFFD_PAGE_DIRTY);
	}
	close_access(&access);
}

int uffd_engine_writeprotect(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			     uint64_t offset, uint64_t length, uint32_t how,
			     uint8_t *states_ret)
{
	uint64_t give_up = 0, first = offset, end = offset + length, shift = 12;
	unsigned int attempt = 0;
	int r = 0;

	/* A thread whose fault was just resolved may be ahead of the page's state. */
	await_work(engine);
	while (offset < end && r == 0) {
		struct uffd_range *range;
		struct access access;
		uint64_t at, past;

		if (!open_access(engine, ref->space, &access)) {
			r = -ESRCH;
			break;
		}
		range = find_piece(access.space, ref->id, offset, ref->start + offset);
		if (range) {
			shift = range->page_shift;
			at = range->start + (offset - range->origin);
			past = run_end(range, at, at + (end - offset));
			past = arm_run(range, at, past, how,
				       states_ret + ((offset - first) >> shift), &r);
			offset += past - at;
		} else {
			r = atomic_load(&access.space->gone) ? -ESRCH : -ENOENT;
		}
		close_access(&access);
		if (r == 0)
			attempt = 0;
		if (r != -EAGAIN && r != -ENOMEM)
			continue;
		if (attempt == 0)
			give_up = uffd_now_ns() + engine->options.retry_limit_ns;
		else if (uffd_now_ns() > give_up)
			break;
		uffd_back_off(attempt++);
		r = 0;
	}
	if (r && how)
		take_back(engine, ref, first >> shift, (offset - first) >> shift,
			  states_ret);
	return r;
}
