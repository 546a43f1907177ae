// SPDX-License-Identifier: MIT
/*
 * Hand the content of pages over before they are evicted: to the caller, or to a file.
 *
 * No page is held meanwhile.  Pages are protected first, so that one that is written while
 * it is handed over is known, and stays.  One that is moved is read again: its owner may have
 * mapped something else where it was.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "barrier.h"
#include "evict.h"
#include "page_table.h"
#include "range.h"
#include "slices.h"
#include "space.h"
#include "states.h"
#include "uffd_owner.h"
#include "uffd_transfer.h"
#include "write_back.h"
#include "base/clock.h"

#define PAGES_AT_ONCE	512u
/* How often a page is written to the file while its owner keeps writing to it. */
#define ATTEMPTS	3

/* Where a page is now, and how much follows it there. */
struct place {
	uint64_t address, left, page_size, moves;
	int32_t pid;
};

/* Reading what is moved again and again. */
struct tries {
	uint64_t give_up_ns;
	unsigned int count;
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
		ret->moves = atomic_load(&access.space->moves);
	}
	close_access(&access);
	return range ? 0 : -ENOENT;
}

/* Whether what was read at a place was the range's; while an event is unread that is not known. */
static bool is_still_there(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			   const struct place *place)
{
	uint64_t give_up = uffd_now_ns() + engine->options.retry_limit_ns;
	bool is_same = true, is_changing = true;
	struct access access;

	for (unsigned int attempt = 0; is_same && is_changing; attempt++) {
		if (attempt)
			uffd_back_off(attempt);
		if (uffd_now_ns() > give_up || atomic_load(&engine->end.began) ||
		    !open_access(engine, ref->space, &access))
			return false;
		is_same = atomic_load(&access.space->moves) == place->moves;
		is_changing = is_same && layout_is_changing(access.space);
		close_access(&access);
	}
	return is_same;
}

/* Wait a little, and an error if that has lasted too long. */
static int try_again(struct uffd_engine *engine, struct tries *tries)
{
	if (atomic_load(&engine->end.began))
		return -ECANCELED;
	if (tries->count == 0)
		tries->give_up_ns = uffd_now_ns() + engine->options.retry_limit_ns;
	else if (uffd_now_ns() > tries->give_up_ns)
		return -EAGAIN;
	uffd_back_off(tries->count++);
	return 0;
}

static bool is_present(uint8_t state)
{
	return state == UFFD_PAGE_CLEAN || state == UFFD_PAGE_DIRTY ||
	       state == UFFD_PAGE_SAVED || state == UFFD_PAGE_REMOVED;
}

/*
 * Whether a page that cannot be read is mapped all the same: its owner has forbidden access
 * (mprotect(2)).  Otherwise it was dropped without a notice, and nobody may wait for it.
 */
static bool is_forbidden(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t page_size, uint64_t offset)
{
	struct uffd_range *range;
	struct access access;
	uint8_t seen = UFFD_PAGE_ABSENT;
	uint64_t entry;

	offset &= ~(page_size - 1);
	if (!open_access(engine, ref->space, &access))
		return false;
	range = find_piece(access.space, ref->id, offset, ref->start + offset);
	if (range && read_entries(range, range->start + (offset - range->origin), 1, &entry))
		seen = seen_state(range, UFFD_PAGE_ABSENT, entry);
	close_access(&access);
	return is_present(seen);
}

/* Outside the gate: a page that has been dropped faults. */
int uffd_engine_peek(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, void *target)
{
	struct tries tries = { 0 };
	struct place place;
	int64_t n;
	int r;

	for (uint64_t done = 0; done < length; done += (uint64_t)n) {
		r = place_of(engine, ref, offset + done, &place);
		if (r)
			return r;
		uffd_barrier(UFFD_BARRIER_EVICT_PLACED);
		n = uffd_owner_read(place.pid, place.address, (char *)target + done,
				    lower(place.left, length - done));
		if (!is_still_there(engine, ref, &place)) {
			r = try_again(engine, &tries);
			if (r)
				return r;
			n = 0;
			continue;
		}
		tries.count = 0;
		if (n == -EFAULT || n == 0)
			return is_forbidden(engine, ref, place.page_size, offset + done)
				       ? -EACCES : -EFAULT;
		if (n < 0)
			return (int)n;
	}
	return 0;
}

/* Content of offset 0 belongs at `begin`. */
struct back_file {
	int fd;
	uint64_t begin;
};

/* Some pages on their way to a file. */
struct window {
	uint64_t offset, pages, page_size;
	uint8_t wanted[PAGES_AT_ONCE];	/* to be evicted */
	uint8_t states[PAGES_AT_ONCE];	/* as they were when they were protected */
};

static bool is_handed_over(const struct window *window, uint64_t page, bool written_only)
{
	uint8_t state = window->states[page];

	return window->wanted[page] &&
	       (!written_only || state == UFFD_PAGE_DIRTY || state == UFFD_PAGE_REMOVED);
}

/*
 * Write what is handed over of [first, past), which is all at one place.  Returns an error, and the
 * first page that is not in the file.
 */
static int write_runs(const struct window *window, const struct back_file *file,
		      const struct place *place, uint64_t first, uint64_t past, bool written_only,
		      uint64_t *reached_ret)
{
	uint64_t size = window->page_size, page = first, from;
	int r = 0;

	while (r == 0 && page < past) {
		uint64_t written = 0;

		for (; page < past && !is_handed_over(window, page, written_only); page++)
			;
		for (from = page; page < past && is_handed_over(window, page, written_only); page++)
			;
		if (from == page)
			break;
		uffd_barrier(UFFD_BARRIER_EVICT_PLACED);
		do
			r = uffd_transfer_write(file->fd,
						(int64_t)(file->begin + window->offset + from * size),
						(void *)(uintptr_t)(place->address +
								    (from - first) * size),
						(page - from) * size, &written);
		while (r == -EINTR);
		if (r)
			page = from + written / size;
	}
	*reached_ret = page;
	return r;
}

/*
 * Returns an error, and the first page that is not in the file.  Where pages are is looked up
 * before they are written, and checked afterwards, once for all that are at one place.
 */
static int write_window(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			const struct back_file *file, struct window *window, bool written_only,
			uint64_t *reached_ret)
{
	uint64_t size = window->page_size, page, past;
	struct tries tries = { 0 };
	struct place place;
	int r = 0;

	for (*reached_ret = 0; r == 0 && *reached_ret < window->pages;) {
		page = *reached_ret;
		if (!is_handed_over(window, page, written_only)) {
			++*reached_ret;
			continue;
		}
		r = place_of(engine, ref, window->offset + page * size, &place);
		if (r)
			break;
		past = lower(window->pages, page + place.left / size);
		r = write_runs(window, file, &place, page, past, written_only, &page);
		if (!is_still_there(engine, ref, &place)) {
			r = try_again(engine, &tries);
			continue;
		}
		tries.count = 0;
		*reached_ret = page;
		if (r == -EFAULT) {
			if (is_forbidden(engine, ref, size, window->offset + page * size))
				return -EACCES;
			/* Dropped without a notice, with the inline driver: it stays. */
			window->wanted[page] = 0;
			++*reached_ret;
			r = 0;
		}
	}
	return r;
}

/* Nobody has their content: mark the pages from this one on as written again. */
static void call_written(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 const struct window *window, uint64_t page)
{
	uint8_t state;

	for (; page < window->pages; page++)
		if (window->states[page] == UFFD_PAGE_DIRTY)
			uffd_engine_writeprotect(engine, ref,
						 window->offset + page * window->page_size,
						 window->page_size, UFFD_UNPROTECT, &state);
}

/*
 * Protect the pages of a window, hand over those that are there, and evict them.  Afterwards
 * `wanted` is what was written meanwhile.
 */
static int evict_window(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			const struct back_file *file, struct window *window, bool written_only,
			uint64_t *evicted)
{
	uint64_t length = window->pages * window->page_size, done, reached, page = 0, wanted = 0;
	uint8_t after[PAGES_AT_ONCE];
	int r = uffd_engine_writeprotect(engine, ref, window->offset, length,
					 UFFD_PROTECT_TO_EVICT, window->states);

	if (r)
		return r;
	for (uint64_t i = 0; i < window->pages; i++)
		window->wanted[i] = is_present(window->states[i]);
	r = write_window(engine, ref, file, window, written_only, &page);
	if (r) {
		call_written(engine, ref, window, page);
		return r;
	}
	for (uint64_t i = 0; i < window->pages; i++)
		wanted += window->wanted[i] * window->page_size;
	r = uffd_engine_evict(engine, ref, window->offset, length, window->wanted, 0, &done,
			      &reached);
	*evicted += done;
	if (r || done == wanted) {
		/* All that went had not been written. */
		memset(window->wanted, 0, sizeof(window->wanted));
		return r;
	}
	r = uffd_engine_states(engine, ref, window->offset / window->page_size, window->pages,
			       after);
	for (uint64_t i = 0; i < window->pages; i++)
		window->wanted[i] = r == 0 && window->wanted[i] && after[i] == UFFD_PAGE_DIRTY;
	return r;
}

/*
 * Only what is still to go is protected again: a page that has come back and was written
 * must stay known as written.
 */
static int evict_pages(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		       const struct back_file *file, uint64_t offset, uint64_t pages,
		       bool written_only, unsigned int attempts, uint64_t *evicted)
{
	struct window window = { .offset = offset, .pages = pages };
	struct place place;
	int r = place_of(engine, ref, offset, &place);

	if (r)
		return r;
	window.page_size = place.page_size;
	r = evict_window(engine, ref, file, &window, written_only, evicted);
	for (uint64_t page = 0, first; r == 0 && attempts > 1 && page < pages;) {
		for (; page < pages && !window.wanted[page]; page++)
			;
		for (first = page; page < pages && window.wanted[page]; page++)
			;
		if (first < page)
			r = evict_pages(engine, ref, file, offset + first * place.page_size,
					page - first, written_only, attempts - 1, evicted);
	}
	return r;
}

/* The page in which the source ends is written whole, so its file may grow. */
static int let_grow(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		    const struct back_file *file, uint64_t offset, uint64_t end)
{
	struct uffd_content *content = NULL;
	struct uffd_range *range;
	struct access access;
	int r = 0;

	if (!open_access(engine, ref->space, &access))
		return -ESRCH;
	range = find_piece(access.space, ref->id, offset, ref->start + offset);
	if (range && uffd_content_has_tail(range->content) && end > range->content->length)
		content = uffd_content_get(range->content);
	close_access(&access);
	if (content) {
		r = uffd_content_let_grow(content, file->fd, file->begin);
		uffd_content_put(content);
	}
	return range ? r : -ENOENT;
}

int uffd_engine_evict_to(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, int32_t fd, uint64_t begin,
			 uint32_t written_only, uint64_t *evicted_ret, uint64_t *reached_ret)
{
	const struct back_file file = { fd, begin };
	uint64_t end = offset + length, pages;
	struct place place;
	int r = let_grow(engine, ref, &file, offset, end);

	*evicted_ret = 0;
	for (*reached_ret = offset; r == 0 && *reached_ret < end;) {
		r = place_of(engine, ref, *reached_ret, &place);
		if (r)
			break;
		pages = lower((end - *reached_ret) / place.page_size, PAGES_AT_ONCE);
		r = evict_pages(engine, ref, &file, *reached_ret, pages, written_only, ATTEMPTS,
				evicted_ret);
		if (r == 0)
			*reached_ret += pages * place.page_size;
	}
	return r;
}
