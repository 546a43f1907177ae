// SPDX-License-Identifier: MIT
/*
 * Resolve a page's fault.  All of it is async-signal-safe, except for queueing a
 * request.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "barrier.h"
#include "failures.h"
#include "fill.h"
#include "page_table.h"
#include "put.h"
#include "queue.h"
#include "resolve.h"
#include "save.h"
#include "say.h"
#include "space.h"
#include "stats.h"

/* Sequential faults double the span filled ahead, up to this many chunks. */
#define READAHEAD_MAX_CHUNKS	8

/* Resolving one page */

/* The page's content is unavailable: never fill it with zeros. */
enum outcome apply_on_error(struct uffd_range *range, uint64_t page, int error,
			    enum uffd_failure_stage stage, uint32_t thread_id)
{
	struct uffd_engine *engine = range->space->engine;
	bool poisons = engine->options.on_error == UFFD_ON_ERROR_POISON;
	int r = 0;

	/* This thread was blocked until after the end: there is nothing left to do. */
	if (atomic_load(&engine->end.over))
		return OUTCOME_FAILED;
	/*
	 * In a write-protect fault the page is there: do not list it among those without
	 * content.
	 */
	if (atomic_load(state_of(range, page)) == UFFD_PAGE_DIRTY)
		note_failure(engine, page, range->page_size, error, stage);
	else
		note_failed_page(range, page, error, stage);
	say_page_fails(range, page, error, stage);
	if (engine->options.on_error == UFFD_ON_ERROR_KILL)
		r = space_kill(range->space, thread_id, page);
	/* If the process cannot be found (a fork), poison the page instead of killing. */
	if (r && r != -ESRCH)
		note_failure(engine, page, range->page_size, r, UFFD_FAILED_RESOLVE);
	poisons = poisons || r;
	/* A page that is present (a write-protect fault) cannot be poisoned. */
	if (atomic_load(state_of(range, page)) == UFFD_PAGE_DIRTY)
		return OUTCOME_FAILED;
	if (poisons)
		poison_page(range, page);
	else
		atomic_store(state_of(range, page), UFFD_PAGE_ABSENT);
	return OUTCOME_FAILED;
}

/* The faulting thread's id; 0 with the inline driver, where it is this thread. */
static uint32_t thread_of(const struct deferred_fault *fault)
{
	return fault ? fault->thread_id : 0;
}

/*
 * Whether another thread has a page.  That thread wakes only faults that it knows of: count
 * this one, then look again.
 */
static bool is_turned_away(struct uffd_range *range, _Atomic uint8_t *state, uint8_t *was)
{
	if (!uffd_page_is_in_flight(*was))
		return false;
	atomic_fetch_add(&range->space->engine->turned_away, 1);
	*was = atomic_load(state);
	return uffd_page_is_in_flight(*was);
}

/* Claim a page; false if another thread has it.  `was_ret`: its state before. */
static bool claim(struct uffd_range *range, uint64_t page, uint8_t as, uint8_t *was_ret)
{
	_Atomic uint8_t *state = state_of(range, page);

	*was_ret = atomic_load_explicit(state, memory_order_acquire);
	do {
		if (is_turned_away(range, state, was_ret))
			return false;
	} while (!atomic_compare_exchange_weak(state, was_ret, as));
	uffd_barrier(UFFD_BARRIER_FAULT_CLAIMED);
	return true;
}

static bool claim_absent(struct uffd_range *range, uint64_t page)
{
	uint8_t expected = UFFD_PAGE_ABSENT;

	return atomic_compare_exchange_strong(state_of(range, page), &expected,
					      UFFD_PAGE_IN_FLIGHT);
}

static enum outcome gone(struct uffd_space *space, int error)
{
	if (error == -ESRCH)
		atomic_store(&space->gone, true);
	count(space->engine, COUNTER(layout_changed), 1);
	return OUTCOME_GONE;
}

/* Request a claimed page from a worker, and its absent neighbours with it. */
static enum outcome ask_for(struct uffd_range *range, uint64_t page,
			    const struct deferred_fault *fault)
{
	uint64_t at = page, end = page + range->page_size, from = at, to = end;

	if (range->space->engine->options.prefetch)
		prefetch_span(range, page, &from, &to);
	while (end < to && needs_request(range, end) && claim_absent(range, end))
		end += range->page_size;
	while (at > from && needs_request(range, at - range->page_size) &&
	       claim_absent(range, at - range->page_size))
		at -= range->page_size;
	set_states(range, at, end, UFFD_PAGE_REQUESTED);
	if (queue_request(range, at, end, fault, NULL))
		return OUTCOME_REQUESTED;
	unclaim(range, at, page, UFFD_PAGE_ABSENT);
	unclaim(range, page + range->page_size, end, UFFD_PAGE_ABSENT);
	return apply_on_error(range, page, -ENOMEM, UFFD_FAILED_RESOLVE,
			      thread_of(fault));
}

/*
 * On Linux 6.18 a fill of hugetlb memory fails with EEXIST also if no huge page is free
 * (measured; Linux 6.12: ENOMEM).  The owner's page table tells whether the page is
 * present.  If the owner is unknown (a fork), call the page absent, so that a later fault
 * does not fill it with zeros.  If pages arrive protected, one put there by others is
 * clean only if it is protected as well.
 */
static uint8_t state_of_existing(const struct uffd_range *range, uint64_t page)
{
	uint64_t entry;

	if (!is_huge(range) && !(range->mode & UFFDIO_REGISTER_MODE_WP))
		return UFFD_PAGE_CLEAN;
	if (!read_entries(range, page, 1, &entry))
		return is_huge(range) ? UFFD_PAGE_ABSENT : UFFD_PAGE_DIRTY;
	if (is_huge(range) && !(entry & UFFD_PM_PRESENT))
		return UFFD_PAGE_ABSENT;
	/* The page cache holds it, and a minor fault will follow. */
	if (range->mode & UFFDIO_REGISTER_MODE_MINOR && !(entry & (UFFD_PM_PRESENT | UFFD_PM_SWAP)))
		return UFFD_PAGE_ABSENT;
	return !(range->mode & UFFDIO_REGISTER_MODE_WP) || entry & UFFD_PM_UFFD_WP
		? UFFD_PAGE_CLEAN : UFFD_PAGE_DIRTY;
}

void set_filled(struct uffd_range *range, uint64_t at, uint64_t past,
		const struct uffd_fill_result *result)
{
	if (!result->already_present)
		set_states(range, at, past, UFFD_PAGE_CLEAN);
	else
		for (; at < past; at += range->page_size)
			atomic_store(state_of(range, at), state_of_existing(range, at));
}

bool is_lacking(const struct uffd_range *range, uint64_t page)
{
	return is_huge(range) && state_of_existing(range, page) == UFFD_PAGE_ABSENT;
}

/*
 * With no huge page free, a woken thread just faults again.  So if a fill says EEXIST in
 * step after step, the page is missing: defer the fault and let the thread sleep.
 */
bool lacks_huge_page(struct uffd_range *range, uint64_t page, uint64_t occasion)
{
	if (!is_lacking(range, page))
		return false;
	if (atomic_exchange(&range->exists_at, page) != page)
		atomic_store(&range->exists_count, 0);
	/* Many threads may fault on one page at once. */
	else if (atomic_load(&range->exists_occasion) == occasion)
		return atomic_load(&range->exists_count) > EXISTS_LIMIT;
	atomic_store(&range->exists_occasion, occasion);
	return atomic_fetch_add(&range->exists_count, 1) >= EXISTS_LIMIT;
}

/* Whether the page's content comes from a source: neither zeros nor what the page cache has. */
static bool is_lost_when_dropped(const struct uffd_range *range, enum uffd_fault_kind kind)
{
	return range->content->kind != UFFD_SOURCE_ZERO &&
	       range->content->kind != UFFD_SOURCE_NONE &&
	       (kind == UFFD_KIND_MISSING || range->content->writes_cache);
}

/* What the page cache has of a page that is mapped again may have been written before. */
static uint8_t filled_state(const struct uffd_range *range, enum uffd_fault_kind kind, uint8_t was)
{
	bool changed = was == UFFD_PAGE_DIRTY || was == UFFD_PAGE_REMOVED;

	if (kind != UFFD_KIND_MINOR && was != UFFD_PAGE_ABSENT)
		return UFFD_PAGE_REMOVED;
	return range->mode & UFFDIO_REGISTER_MODE_WP && changed ? UFFD_PAGE_DIRTY : UFFD_PAGE_CLEAN;
}

/*
 * After the fill: set the state of the claimed page, and return what became of the fault.
 * `was`: its state before it was claimed.
 */
static enum outcome settle_absence(struct uffd_range *range, uint64_t page,
				   enum uffd_fault_kind kind, uint8_t was, int r,
				   const struct uffd_fill_result *result,
				   const struct deferred_fault *fault)
{
	_Atomic uint8_t *state = state_of(range, page);
	bool was_absent = was == UFFD_PAGE_ABSENT;
	/* EFAULT: the page cache has lost it; or else it is what was to be written there. */
	bool was_cached = kind == UFFD_KIND_MINOR &&
			  !(was_absent && range->content->writes_cache);

	if (r == 0 && result->done) {
		atomic_store(&range->exists_count, 0);
		count(range->space->engine, COUNTER(filled_pages), 1);
		atomic_store(state, filled_state(range, kind, was));
		return OUTCOME_RESOLVED;
	}
	if (r == 0 && result->already_present) {
		const struct uffd_engine *engine = range->space->engine;
		/* The inline driver counts repeated faults by itself. */
		bool lacking = kind != UFFD_KIND_MINOR && !engine->options.is_inline &&
			       lacks_huge_page(range, page, engine->steps);

		atomic_store(state, was_absent ? state_of_existing(range, page) : was);
		if (lacking)
			return OUTCOME_DEFER;
		if (is_huge(range))
			uffd_shim_wake(range->space->fd, page, range->page_size);
		count(range->space->engine, COUNTER(already_present), 1);
		return OUTCOME_PRESENT;
	}
	if (r == 0 || r == -ENOMEM) {
		atomic_store(state, was);
		return OUTCOME_DEFER;
	}
	if (r == -ENOENT || r == -ESRCH || (r == -EFAULT && was_cached)) {
		unclaim(range, page, page + range->page_size, was);
		return gone(range->space, r);
	}
	return apply_on_error(range, page, r,
			      r == -EFAULT || r == -ENODATA || r == -EIO ? UFFD_FAILED_SOURCE
									 : UFFD_FAILED_RESOLVE,
			      thread_of(fault));
}

static enum outcome resolve_absence(struct uffd_range *range, uint64_t page,
				    enum uffd_fault_kind kind, const struct deferred_fault *fault)
{
	struct uffd_fill_result result = { 0 };
	enum fill_for why;
	bool put_off;
	uint8_t was;
	int r;

	if (!claim(range, page, UFFD_PAGE_IN_FLIGHT, &was)) {
		if (kind != UFFD_KIND_MINOR || (was != UFFD_PAGE_EVICTING && was != UFFD_PAGE_EVICTED))
			return OUTCOME_IN_FLIGHT;
		r = put_going(range, page);
		return r == 0 ? OUTCOME_PRESENT : r == -EAGAIN ? OUTCOME_DEFER : OUTCOME_IN_FLIGHT;
	}
	if (was == UFFD_PAGE_POISONED) {
		/* There is still no content, and COPY would replace the poison. */
		poison_one(range, page, &put_off);
		atomic_store(state_of(range, page), UFFD_PAGE_POISONED);
		if (put_off)
			return OUTCOME_DEFER;
		return OUTCOME_POISONED;
	}
	/* Fill it through the page cache, even if that has a hole here. */
	if (was == UFFD_PAGE_ABSENT && range->content->writes_cache)
		kind = UFFD_KIND_MINOR;
	why = fill_for_fault(kind, fault);
	if (was == UFFD_PAGE_ABSENT && is_lost_when_dropped(range, kind) && !is_zeros(range, page)) {
		if (atomic_load(&range->space->engine->refusing)) {
			poison_page(range, page);
			return OUTCOME_FAILED;
		}
		if (stands_in(range->space->engine))
			return apply_on_error(range, page, -EOWNERDEAD, UFFD_FAILED_SOURCE,
					      thread_of(fault));
		if (needs_request(range, page))
			return ask_for(range, page, fault);
	}
	if (was == UFFD_PAGE_ABSENT)
		r = put_content(range, page, range->page_size, why, &result);
	else if (kind == UFFD_KIND_MINOR)
		r = put_continue(range, page, range->page_size, why, &result);
	else
		/* It was present before: dropped since, or this message is old (EEXIST). */
		r = put_zeros(range, page, range->page_size, why, &result);
	return settle_absence(range, page, kind, was, r, &result, fault);
}

/*
 * The old content could not be saved.  Unprotecting the page would lose it, and a present
 * page cannot be poisoned: its writers wait until it is saved or taken out.
 */
static enum outcome keep_protected(struct uffd_range *range, uint64_t page, int error,
				   const struct deferred_fault *fault)
{
	struct uffd_engine *engine = range->space->engine;

	atomic_store(state_of(range, page), UFFD_PAGE_CLEAN);
	if (error == -EAGAIN || error == -ENOMEM)
		return OUTCOME_DEFER;
	if (error == -ESRCH && space_is_dead(range->space))
		return gone(range->space, error);
	note_failed_page(range, page, error, UFFD_FAILED_SAVE);
	if (engine->options.on_error == UFFD_ON_ERROR_KILL)
		space_kill(range->space, thread_of(fault), page);
	return OUTCOME_FAILED;
}

static enum outcome resolve_write_protect(struct uffd_range *range, uint64_t page,
					  const struct deferred_fault *fault)
{
	bool written;
	uint8_t was;
	int r;

	if (!claim(range, page, UFFD_PAGE_HELD, &was))
		return OUTCOME_IN_FLIGHT;
	if (preserves(range) && was == UFFD_PAGE_CLEAN) {
		r = save_page(range, page);
		if (r)
			return keep_protected(range, page, r, fault);
	}
	/*
	 * The page is held until it is unprotected: uffd_engine_writeprotect() sees it
	 * dirty and unprotected, or as it was before.  Readers of the states wait for us.
	 */
	written = may_be_written(range, page, was);
	r = uffd_shim_writeprotect(range->space->fd, page, range->page_size,
				   fault && fault->late ? UFFDIO_WRITEPROTECT_MODE_DONTWAKE : 0);
	uffd_barrier(UFFD_BARRIER_LIFTED);
	/* The writer may have dropped it since, or somebody mapped it in between. */
	written = written || may_be_written(range, page, was);
	atomic_store(state_of(range, page), written ? UFFD_PAGE_DIRTY : was);
	if (r == 0)
		return OUTCOME_RESOLVED;
	if (r == -EAGAIN || r == -ENOMEM)
		return OUTCOME_DEFER;
	if (r == -ENOENT || r == -ESRCH)
		return gone(range->space, r);
	return apply_on_error(range, page, r, UFFD_FAILED_RESOLVE,
			      thread_of(fault));
}

enum outcome resolve_page(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			  const struct deferred_fault *fault)
{
	if (kind == UFFD_KIND_WP)
		return resolve_write_protect(range, page, fault);
	return resolve_absence(range, page, kind, fault);
}

enum outcome resolve_as_leader(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			       const struct deferred_fault *fault)
{
	struct uffd_engine *engine = range->space->engine;
	enum outcome outcome;

	may_be_held_up(engine);
	outcome = resolve_page(range, page, kind, fault);
	return is_back(engine) ? outcome : OUTCOME_DISMISSED;
}

/* Filling more than one page */

/* Claim an absent page whose content is here; an outline's zeros are. */
static bool claim_filled(struct uffd_range *range, uint64_t page)
{
	return (!needs_request(range, page) || is_zeros(range, page)) && claim_absent(range, page);
}

struct fill_run fill_absent(struct uffd_range *range, uint64_t at, uint64_t end, enum fill_for why)
{
	const struct uffd_content *content = range->content;
	uint64_t tail_at = content->length - range->origin + range->start;
	struct uffd_fill_result result;
	uint64_t stop, past;
	int r;

	while (at < end && !claim_filled(range, at))
		at += range->page_size;
	if (at >= end)
		return (struct fill_run){ .from = end, .past = end };
	if (uffd_content_has_tail(content) && at < tail_at && tail_at < end)
		end = tail_at;
	stop = at + range->page_size;
	while (stop < end && claim_filled(range, stop))
		stop += range->page_size;
	uffd_barrier(UFFD_BARRIER_FILL_CLAIMED);
	r = put_content(range, at, stop - at, why, &result);
	uffd_barrier(UFFD_BARRIER_PLACED);
	past = at + result.done + result.already_present;
	set_filled(range, at, past, &result);
	if (is_huge(range) && result.already_present)
		uffd_shim_wake(range->space->fd, at, past - at);
	unclaim(range, past, stop, UFFD_PAGE_ABSENT);
	if (r == -EFAULT && content->kind == UFFD_SOURCE_NONE) {
		/* A hole in the page cache: there is nothing to fill it with. */
		past += range->page_size;
		r = 0;
	}
	count(range->space->engine, COUNTER(filled_pages), result.done >> range->page_shift);
	if (r == -ESRCH)
		atomic_store(&range->space->gone, true);
	return (struct fill_run){
		.from = at,
		.past = past,
		.filled = result.done,
		.error = r ? r : result.deferred ? -EAGAIN : 0,
	};
}

void prefetch_span(struct uffd_range *range, uint64_t page, uint64_t *from_ret, uint64_t *to_ret)
{
	uint64_t chunk = range->space->engine->options.prefetch;
	uint64_t from = range->start + (page - range->start) / chunk * chunk;
	uint32_t chunks = 1;
	uint64_t to;

	if (page == atomic_load_explicit(&range->readahead_at, memory_order_relaxed)) {
		chunks = 2 * atomic_load_explicit(&range->readahead_chunks, memory_order_relaxed);
		if (chunks < 1)
			chunks = 1;
		if (chunks > READAHEAD_MAX_CHUNKS)
			chunks = READAHEAD_MAX_CHUNKS;
	}
	to = (range->end - from) / chunk >= chunks ? from + chunks * chunk : range->end;
	/* Whole pages, even if the chunk is smaller than one. */
	from = page_of(range, from);
	if (to < range->end)
		to = page_of(range, to + range->page_size - 1);
	atomic_store_explicit(&range->readahead_chunks, chunks, memory_order_relaxed);
	atomic_store_explicit(&range->readahead_at, to, memory_order_relaxed);
	*from_ret = from;
	*to_ret = to;
}
