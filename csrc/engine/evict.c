// SPDX-License-Identifier: MIT
/*
 * Drop pages of this process, so that their source is asked again.
 *
 * A page is claimed as EVICTING while it is dropped, so that a thread that faults on it
 * waits, and gets neither zeros nor what the page held.  Private memory is dropped inside the
 * gate: a thread that moves or unmaps it goes on when its event has been read, and may then
 * map something else there, which must stay.  But dropping sends a REMOVE event if those are
 * on, which the leader must read, and that of shared memory may wait for a write(2) to its
 * file, which waits for the leader: then no gate is held meanwhile (see put_going() too).  The
 * event makes the page EVICTED, which tells it from one that its owner drops besides.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "barrier.h"
#include "evict.h"
#include "gate.h"
#include "page_table.h"
#include "put.h"
#include "range.h"
#include "registered.h"
#include "slices.h"
#include "space.h"
#include "stats.h"
#include "base/clock.h"

#define PAGES_AT_ONCE	512u
/* Of the page table: read ahead, at first few and then more of them, for runs that are short. */
#define FEW_ENTRIES	8u
#define MOST_ENTRIES	64u

struct eviction {
	struct uffd_engine *engine;
	struct uffd_range_ref ref;
	uint64_t offset;	/* of the next page to look at */
	uint64_t end;
	const uint8_t *wanted;	/* for the page at `first` */
	uint64_t first;
	bool written_too;
	uint64_t give_up_ns;	/* while the next page is in flight, or memory is moved */
	unsigned int attempt;
	uint64_t ours_start, ours_end;	/* one mapping that is registered */
	/* Of the page table, for the pages from `known_at` on. */
	uint64_t known_at, known, ahead;
	uint64_t entries[MOST_ENTRIES];
};

/* Pages that are claimed and about to be dropped. */
struct claimed_run {
	uint64_t offset;
	uint64_t address;
	uint64_t length;
	int advice;
	uint64_t moves;		/* the space's, when `address` was right */
	bool is_inside;		/* dropped inside the gate */
	bool is_waiting;	/* for the page behind it */
	uint64_t turned_away;	/* the engine's, before it was claimed */
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

/*
 * The same, where the entry may be older than the state: the page may have been filled, or
 * dropped by its owner, since.
 */
static bool may_go_now(const struct uffd_range *range, uint64_t page, uint8_t state,
		       uint64_t *entry, bool written_too)
{
	bool present = *entry & UFFD_PM_PRESENT;

	if ((state == UFFD_PAGE_CLEAN && !present) || (state == UFFD_PAGE_REMOVED && present))
		if (!read_entries(range, page, 1, entry))
			return false;
	return may_go(range, state, *entry, written_too);
}

/* A claimed page will be absent: the next checkpoint must know whether it was written. */
static void note_written(struct uffd_range *range, uint64_t page, uint8_t state, uint64_t entry)
{
	uint8_t seen = seen_state(range, state, entry);

	if (range->mode & UFFDIO_REGISTER_MODE_WP &&
	    (seen == UFFD_PAGE_DIRTY || seen == UFFD_PAGE_REMOVED))
		uffd_pages_note_written(range->pages,
					content_offset(range, page) >> range->page_shift);
}

/* The page table's entry of the next page; pages before `end` may be read with it. */
static bool next_entry(struct uffd_range *range, struct eviction *all, uint64_t at, uint64_t end,
		       uint64_t *entry_ret)
{
	uint64_t index = (all->offset - all->known_at) >> range->page_shift;

	if (all->offset < all->known_at || index >= all->known) {
		all->ahead = all->ahead ? lower(2 * all->ahead, MOST_ENTRIES) : FEW_ENTRIES;
		all->known = lower((end - at) >> range->page_shift, all->ahead);
		all->known_at = all->offset;
		index = 0;
		if (!read_entries(range, at, all->known, all->entries)) {
			all->known = 0;
			return false;
		}
	}
	*entry_ret = all->entries[index];
	return true;
}

/*
 * The source's last page, if it was copied when serving began: it would come back as it was
 * then.
 */
static bool is_kept_tail(const struct uffd_range *range, uint64_t offset)
{
	return range->content->kept && uffd_content_is_tail(range->content, offset);
}

/* Claim the next run of pages that may go; a length of 0: there is none before `end`. */
static void claim_run(struct uffd_range *range, struct eviction *all, struct claimed_run *run)
{
	uint64_t at = range->start + (all->offset - range->origin), end, pages, entry;

	end = lower(range->end, at + (all->end - all->offset));
	pages = lower((end - at) >> range->page_shift, PAGES_AT_ONCE);
	run->length = 0;
	run->is_waiting = false;
	run->turned_away = atomic_load(&all->engine->turned_away);
	for (; pages--; at += range->page_size, all->offset += range->page_size) {
		uint8_t state = atomic_load(state_of(range, at)), seen = state;

		if (!next_entry(range, all, at, end, &entry)) {
			all->offset = run->length ? all->offset : all->end;
			break;
		}
		/* Filled beside the handler, or by Linux from the page cache. */
		if (state == UFFD_PAGE_ABSENT)
			seen = seen_state(range, state, entry);
		if (!all->wanted[(all->offset - all->first) >> range->page_shift] ||
		    is_kept_tail(range, all->offset) ||
		    (!uffd_page_is_in_flight(state) &&
		     !may_go_now(range, at, seen, &entry, all->written_too))) {
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
		note_written(range, at, state, entry);
		if (!run->length)
			run->offset = all->offset, run->address = at;
		run->before[run->length >> range->page_shift] = state;
		run->length += range->page_size;
	}
	run->advice = range->content->shared ? MADV_REMOVE : MADV_DONTNEED;
}

/*
 * The state of a page that has been dropped.  If its owner had dropped it before, and its
 * zeros were not handed over, it stays REMOVED: the source would bring back older content.
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
	/* Threads that faulted meanwhile wait for this. */
	wake_turned_away(range, at, end, run->turned_away);
}

/* The next page cannot go yet: wait a little, and an error if that has lasted too long. */
static int wait_before(struct eviction *all, int error)
{
	if (all->attempt == 0)
		all->give_up_ns = uffd_now_ns() + all->engine->options.retry_limit_ns;
	else if (uffd_now_ns() > all->give_up_ns)
		return error;
	uffd_back_off(all->attempt++);
	return 0;
}

/*
 * Whether the pages of a run are still in registered memory.  Without events the owner may
 * have mapped something else there, which must not be dropped.  Ask once for what this call
 * has still to do, as long as that is one mapping.
 */
static bool is_still_ours(const struct uffd_range *range, const struct claimed_run *run,
			  struct eviction *all)
{
	const uint32_t both = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP;
	uint64_t at = run->address, end = at + run->length;
	uint64_t rest = lower(range->end, at + (all->end - run->offset));
	bool one;

	if ((range->space->layout_events & both) == both)
		return true;
	if (all->ours_start <= at && end <= all->ours_end)
		return true;
	if (!is_one_mapping(range, at, rest, &one) && one) {
		all->ours_start = at, all->ours_end = rest;
		return true;
	}
	/* Several mappings, if others have split it (mprotect(2)). */
	for (; at < end; at += range->page_size)
		if (!is_one_mapping(range, at, at + range->page_size, &one) && !one)
			return false;
	return true;
}

static int drop_run(const struct claimed_run *run)
{
	return madvise((void *)(uintptr_t)run->address, run->length, run->advice) ? -errno : 0;
}

/* Inside the gate: drop a run that may be dropped there.  An error of the range, or of that. */
static int drop_inside(struct uffd_range *range, struct claimed_run *run, struct eviction *all)
{
	if (!is_still_ours(range, run, all))
		return -ENOENT;
	if (!run->is_inside)
		return 0;
	uffd_barrier(UFFD_BARRIER_EVICT_CLAIMED);
	return layout_is_changing(range->space) ? -EAGAIN : drop_run(run);
}

/*
 * Inside the gate: claim the next run.  Those that may be dropped here are, one after the
 * other, so that each page that stands alone is not looked up twice.  A run that is left has a
 * length; an error is of the range, or of dropping that run.
 */
static int claim_and_drop(struct uffd_range *range, struct eviction *all, struct claimed_run *run,
			  uint64_t *evicted)
{
	struct uffd_space *space = range->space;
	uint64_t enough = all->offset + PAGES_AT_ONCE * range->page_size;
	int r;

	do {
		claim_run(range, all, run);
		run->is_inside = run->advice == MADV_DONTNEED &&
				 !(space->layout_events & UFFD_FEATURE_EVENT_REMOVE);
		run->moves = atomic_load(&space->moves);
		if (!run->length)
			return 0;
		r = drop_inside(range, run, all);
		if (r || !run->is_inside)
			return r;
		uffd_barrier(UFFD_BARRIER_EVICT_DROPPED);
		end_run(range, run, all->written_too, true);
		*evicted += run->length;
		all->attempt = 0;
		run->length = 0;
		run->is_waiting = false;
	} while (all->offset < enough && !gate_is_wanted(space));
	return 0;
}

/* Returns an error of the range, or of dropping its pages. */
static int evict_some(struct eviction *all, uint64_t *evicted)
{
	struct uffd_range *range = NULL;
	struct claimed_run run = { 0 };
	struct access access;
	bool is_moved;
	int r = 0;

	if (!open_access(all->engine, all->ref.space, &access))
		return -ESRCH;
	range = find_piece(access.space, all->ref.id, all->offset, all->ref.start + all->offset);
	if (range)
		r = claim_and_drop(range, all, &run, evicted);
	close_access(&access);
	if (!range)
		return -ENOENT;
	if (!run.length && run.is_waiting)
		return wait_before(all, -ETIMEDOUT);
	if (!run.length) {
		all->attempt = 0;
		return 0;
	}
	if (r == 0)
		r = drop_run(&run);
	uffd_barrier(UFFD_BARRIER_EVICT_DROPPED);
	if (!open_access(all->engine, all->ref.space, &access))
		return -ESRCH;
	range = find_piece(access.space, all->ref.id, run.offset, run.address);
	if (range)
		end_run(range, &run, all->written_too, r == 0);
	is_moved = r == -EAGAIN || (r && r != -ENOENT && !layout_is_as(access.space, run.moves));
	close_access(&access);
	if (r == 0) {
		*evicted += run.length;
		all->attempt = 0;
		return 0;
	}
	all->offset = run.offset;
	return is_moved ? wait_before(all, -EAGAIN) : r;
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
	/* A thread that continues may be ahead of its page's state. */
	await_work(engine);
	while (r == 0 && all.offset < all.end)
		r = atomic_load(&engine->end.began) ? -ECANCELED : evict_some(&all, evicted_ret);
	*reached_ret = all.offset;
	return r;
}
