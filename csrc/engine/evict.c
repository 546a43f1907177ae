// SPDX-License-Identifier: MIT
/*
 * Drop pages of this process, so that their source is asked again.
 *
 * A page is claimed as EVICTING while it is dropped, so that a thread that faults on it
 * waits, and gets neither zeros nor what the page held.  Dropping it sends a REMOVE event
 * if those are on, which the leader must read: so no gate is held meanwhile.  The event
 * makes the page EVICTED, which tells it from one that its owner drops besides.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "evict.h"
#include "page_table.h"
#include "put.h"
#include "range.h"
#include "slices.h"
#include "space.h"
#include "states.h"
#include "stats.h"
#include "uffd_owner.h"
#include "uffd_transfer.h"
#include "base/clock.h"

#define PAGES_AT_ONCE	512u
/* Of the page table, for a run that may be short. */
#define FEW_ENTRIES	8u
/* How often a page is written to the file that is written to meanwhile. */
#define ATTEMPTS	3

struct eviction {
	struct uffd_engine *engine;
	struct uffd_range_ref ref;
	uint64_t offset;	/* of the next page to look at */
	uint64_t end;
	const uint8_t *wanted;	/* for the page at `first` */
	uint64_t first;
	bool written_too;
	uint64_t give_up_ns;	/* while the next page is in flight */
	unsigned int attempt;
};

/* Pages that are claimed and about to be dropped. */
struct claimed_run {
	uint64_t offset;
	uint64_t address;
	uint64_t length;
	int advice;
	bool is_waiting;	/* for the page behind it */
	uint8_t before[PAGES_AT_ONCE];
};

/* Whether a page is there to be dropped; shared memory may be only in the page cache. */
static bool is_there(const struct uffd_range *range, uint8_t state, uint64_t entry)
{
	if (entry & UFFD_PM_PRESENT)
		return true;
	if (range->content->shared)
		return state != UFFD_PAGE_REMOVED;
	return seen_state(range, UFFD_PAGE_ABSENT, entry) != UFFD_PAGE_ABSENT;
}

static bool may_go(const struct uffd_range *range, uint8_t state, uint64_t entry,
		   bool written_too)
{
	bool tracked = range->mode & UFFDIO_REGISTER_MODE_WP;

	if (state != UFFD_PAGE_CLEAN && state != UFFD_PAGE_SAVED && state != UFFD_PAGE_REMOVED &&
	    !(state == UFFD_PAGE_DIRTY && written_too))
		return false;
	if (!is_there(range, state, entry))
		return false;
	/* Others may have lifted the protection: then it may have been written to. */
	return written_too || !tracked || !(entry & UFFD_PM_PRESENT) || entry & UFFD_PM_UFFD_WP;
}

/* The same, where the entry may be older than the state. */
static bool may_go_now(const struct uffd_range *range, uint64_t page, uint8_t state, uint64_t entry,
		       bool written_too)
{
	return may_go(range, state, entry, written_too) ||
	       (!(entry & UFFD_PM_PRESENT) && state == UFFD_PAGE_CLEAN &&
		read_entries(range, page, 1, &entry) && may_go(range, state, entry, written_too));
}

/*
 * Claim the next run of pages that may go; a length of 0: there is none before `end`.  The
 * page table is read right before, and no further than twice as far as the run goes.
 */
static void claim_run(struct uffd_range *range, struct eviction *all, struct claimed_run *run)
{
	uint64_t at = range->start + (all->offset - range->origin), end, pages, i = 0, known = 0;
	uint64_t entries[PAGES_AT_ONCE];

	end = lower(range->end, at + (all->end - all->offset));
	pages = lower((end - at) >> range->page_shift, PAGES_AT_ONCE);
	run->length = 0;
	for (; i < pages; i++, at += range->page_size, all->offset += range->page_size) {
		uint8_t state = atomic_load(state_of(range, at)), seen = state;

		if (i == known) {
			uint64_t more = lower(known ? known : FEW_ENTRIES, pages - known);

			if (!read_entries(range, at, more, entries + known)) {
				all->offset = run->length ? all->offset : all->end;
				break;
			}
			known += more;
		}
		/* Filled beside the handler, or by Linux from the page cache. */
		if (state == UFFD_PAGE_ABSENT)
			seen = seen_state(range, state, entries[i]);
		if (!all->wanted[(all->offset - all->first) >> range->page_shift] ||
		    (!uffd_page_is_in_flight(state) &&
		     !may_go_now(range, at, seen, entries[i], all->written_too))) {
			if (run->length)
				break;
			continue;
		}
		/* Its content may have been read before this call, and must not come after it. */
		if (uffd_page_is_in_flight(state) ||
		    !atomic_compare_exchange_strong(state_of(range, at), &state,
						    UFFD_PAGE_EVICTING)) {
			run->is_waiting = true;
			break;
		}
		if (!run->length)
			run->offset = all->offset, run->address = at;
		run->before[run->length >> range->page_shift] = state;
		run->length += range->page_size;
	}
	run->advice = range->content->shared ? MADV_REMOVE : MADV_DONTNEED;
}

/*
 * What a page is that has been dropped.  Its owner had dropped it before, and nobody has
 * handed the zeros over: the source would bring back what was there before that.
 */
static uint8_t dropped_state(uint8_t before, bool written_too)
{
	return before == UFFD_PAGE_REMOVED && written_too ? UFFD_PAGE_REMOVED : UFFD_PAGE_ABSENT;
}

/* The pages are absent or, if they could not be dropped, what they were. */
static void end_run(struct uffd_range *range, const struct claimed_run *run, bool written_too,
		    bool dropped)
{
	uint64_t at = range->start + (run->offset - range->origin);
	uint64_t end = lower(at + run->length, range->end);
	uint64_t entry;

	for (uint64_t page = at, i = 0; page < end; page += range->page_size, i++) {
		uint8_t evicting = UFFD_PAGE_EVICTING, evicted = UFFD_PAGE_EVICTED;
		uint8_t now = dropped_state(run->before[i], written_too);

		if (!dropped && read_entries(range, page, 1, &entry) && entry & UFFD_PM_PRESENT)
			now = run->before[i];
		if (!atomic_compare_exchange_strong(state_of(range, page), &evicting, now))
			atomic_compare_exchange_strong(state_of(range, page), &evicted, now);
	}
	/* Who faulted meanwhile waits for this. */
	wake_again(range, at, end);
}

/* The next page is in flight: wait a little, and an error if that has lasted too long. */
static int wait_in_flight(struct eviction *all)
{
	if (all->attempt == 0)
		all->give_up_ns = uffd_now_ns() + all->engine->options.retry_limit_ns;
	else if (uffd_now_ns() > all->give_up_ns)
		return -ETIMEDOUT;
	uffd_back_off(all->attempt++);
	return 0;
}

/* Returns an error of the range, or of dropping its pages. */
static int evict_run(struct eviction *all, uint64_t *evicted)
{
	struct uffd_range *range = NULL;
	struct claimed_run run = { 0 };
	struct access access;
	int r;

	if (!open_access(all->engine, all->ref.space, &access))
		return -ESRCH;
	range = find_piece(access.space, all->ref.id, all->offset, all->ref.start + all->offset);
	if (range)
		claim_run(range, all, &run);
	close_access(&access);
	if (!range)
		return -ENOENT;
	if (!run.length && run.is_waiting)
		return wait_in_flight(all);
	all->attempt = 0;
	if (!run.length)
		return 0;
	r = madvise((void *)(uintptr_t)run.address, run.length, run.advice) ? -errno : 0;
	if (!open_access(all->engine, all->ref.space, &access))
		return -ESRCH;
	range = find_piece(access.space, all->ref.id, run.offset, run.address);
	if (range)
		end_run(range, &run, all->written_too, r == 0);
	close_access(&access);
	if (r)
		all->offset = run.offset;
	else
		*evicted += run.length;
	return r;
}

int uffd_engine_evict(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		      uint64_t offset, uint64_t length, const uint8_t *wanted,
		      uint32_t written_too, uint64_t *evicted_ret, uint64_t *reached_ret)
{
	struct eviction all = {
		.engine = engine,
		.ref = *ref,
		.offset = offset,
		.end = offset + length,
		.wanted = wanted,
		.first = offset,
		.written_too = written_too,
	};
	int r = 0;

	*evicted_ret = 0;
	/* A thread that goes on may be ahead of its page's state. */
	await_work(engine);
	while (r == 0 && all.offset < all.end)
		r = atomic_load(&engine->end.began) ? -ECANCELED : evict_run(&all, evicted_ret);
	*reached_ret = all.offset;
	return r;
}

/* Where a page is now, and how much follows it there. */
struct place {
	uint64_t address, left, page_size;
	int32_t pid;
};

static int place_of(struct uffd_engine *engine, const struct uffd_range_ref *ref, uint64_t offset,
		    struct place *ret)
{
	struct uffd_range *range;
	struct access access;

	if (!open_access(engine, ref->space, &access))
		return -ESRCH;
	range = find_piece(access.space, ref->id, offset, ref->start + offset);
	if (range) {
		ret->address = range->start + (offset - range->origin);
		ret->left = range->end - ret->address;
		ret->page_size = range->page_size;
		ret->pid = access.space->owner_pid;
	}
	close_access(&access);
	return range ? 0 : -ENOENT;
}

/* Outside the gate: a page that has been dropped faults. */
int uffd_engine_peek(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, void *target)
{
	struct place place;
	int64_t n;
	int r;

	for (uint64_t done = 0; done < length; done += (uint64_t)n) {
		r = place_of(engine, ref, offset + done, &place);
		if (r)
			return r;
		n = uffd_owner_read(place.pid, place.address, (char *)target + done,
				    lower(place.left, length - done));
		if (n <= 0)
			return n ? (int)n : -EFAULT;
	}
	return 0;
}

/* Some pages on their way to a file. */
struct window {
	uint64_t offset, pages, page_size;
	uint8_t wanted[PAGES_AT_ONCE];	/* to be evicted */
	uint8_t states[PAGES_AT_ONCE];	/* as they were when they were protected */
};

static bool is_present(uint8_t state)
{
	return state == UFFD_PAGE_CLEAN || state == UFFD_PAGE_DIRTY ||
	       state == UFFD_PAGE_SAVED || state == UFFD_PAGE_REMOVED;
}

static bool is_handed_over(const struct window *window, uint64_t page, bool written_only)
{
	uint8_t state = window->states[page];

	return window->wanted[page] &&
	       (!written_only || state == UFFD_PAGE_DIRTY || state == UFFD_PAGE_REMOVED);
}

static int write_pages(struct uffd_engine *engine, const struct uffd_range_ref *ref, int fd,
		       uint64_t offset, uint64_t length, uint64_t *done_ret)
{
	struct place place;
	int r = 0;

	for (*done_ret = 0; r == 0 && *done_ret < length;) {
		uint64_t at = offset + *done_ret, written = 0;

		r = place_of(engine, ref, at, &place);
		if (r)
			return r;
		do
			r = uffd_transfer_write(fd, (int64_t)at, (void *)(uintptr_t)place.address,
						lower(place.left, length - *done_ret), &written);
		while (r == -EINTR);
		*done_ret += written;
	}
	return r;
}

/* Returns an error, and the first page that is not in the file. */
static int write_window(struct uffd_engine *engine, const struct uffd_range_ref *ref, int fd,
			struct window *window, bool written_only, uint64_t *reached_ret)
{
	uint64_t page = 0, first, done;
	int r = 0;

	while (r == 0 && page < window->pages) {
		for (; page < window->pages && !is_handed_over(window, page, written_only); page++)
			;
		for (first = page; page < window->pages &&
		     is_handed_over(window, page, written_only); page++)
			;
		*reached_ret = first;
		if (first == page)
			break;
		r = write_pages(engine, ref, fd, window->offset + first * window->page_size,
				(page - first) * window->page_size, &done);
		if (r == -EFAULT) {
			/* Dropped without a notice, with the inline driver: it stays. */
			page = first + done / window->page_size;
			window->wanted[page++] = 0;
			r = 0;
		}
	}
	return r;
}

/* Nobody has their content: call pages written again, from one on. */
static void call_written(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 const struct window *window, uint64_t page)
{
	uint8_t state;

	for (; page < window->pages; page++)
		if (window->states[page] == UFFD_PAGE_DIRTY)
			uffd_engine_writeprotect(engine, ref,
						 window->offset + page * window->page_size,
						 window->page_size, 0, &state);
}

/*
 * Protect the pages of a window, hand over those that are there, and evict them.  Afterwards
 * `wanted` is what was written meanwhile.
 */
static int evict_window(struct uffd_engine *engine, const struct uffd_range_ref *ref, int fd,
			struct window *window, bool written_only, uint64_t *evicted)
{
	uint64_t length = window->pages * window->page_size, done, reached, page = 0;
	uint8_t after[PAGES_AT_ONCE];
	int r = uffd_engine_writeprotect(engine, ref, window->offset, length, 1, window->states);

	if (r)
		return r;
	for (uint64_t i = 0; i < window->pages; i++)
		window->wanted[i] = is_present(window->states[i]);
	r = write_window(engine, ref, fd, window, written_only, &page);
	if (r) {
		call_written(engine, ref, window, page);
		return r;
	}
	r = uffd_engine_evict(engine, ref, window->offset, length, window->wanted, 0, &done,
			      &reached);
	*evicted += done;
	if (r == 0)
		r = uffd_engine_states(engine, ref, window->offset / window->page_size,
				       window->pages, after);
	for (uint64_t i = 0; i < window->pages; i++)
		window->wanted[i] = r == 0 && window->wanted[i] && after[i] == UFFD_PAGE_DIRTY;
	return r;
}

/*
 * Only what is still to go is protected again: a page that has come back and was written
 * must stay known as written.
 */
static int evict_pages(struct uffd_engine *engine, const struct uffd_range_ref *ref, int fd,
		       uint64_t offset, uint64_t pages, bool written_only,
		       unsigned int attempts, uint64_t *evicted)
{
	struct window window = { .offset = offset, .pages = pages };
	struct place place;
	int r = place_of(engine, ref, offset, &place);

	if (r)
		return r;
	window.page_size = place.page_size;
	r = evict_window(engine, ref, fd, &window, written_only, evicted);
	for (uint64_t page = 0, first; r == 0 && attempts > 1 && page < pages;) {
		for (; page < pages && !window.wanted[page]; page++)
			;
		for (first = page; page < pages && window.wanted[page]; page++)
			;
		if (first < page)
			r = evict_pages(engine, ref, fd, offset + first * place.page_size,
					page - first, written_only, attempts - 1, evicted);
	}
	return r;
}

int uffd_engine_evict_to(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, int32_t fd, uint32_t written_only,
			 uint64_t *evicted_ret, uint64_t *reached_ret)
{
	uint64_t end = offset + length, pages;
	struct place place;
	int r = 0;

	*evicted_ret = 0;
	for (*reached_ret = offset; r == 0 && *reached_ret < end;) {
		r = place_of(engine, ref, *reached_ret, &place);
		if (r)
			break;
		pages = lower((end - *reached_ret) / place.page_size, PAGES_AT_ONCE);
		r = evict_pages(engine, ref, fd, *reached_ret, pages, written_only, ATTEMPTS,
				evicted_ret);
		if (r == 0)
			*reached_ret += pages * place.page_size;
	}
	return r;
}
