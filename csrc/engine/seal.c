// SPDX-License-Identifier: MIT
/*
 * Make a piece ready to be taken out.  Absent pages are poisoned, since they would read
 * as zeros.
 *
 * Wait for pages in flight, but not forever: a source may block the thread that fills
 * one.  Then poison it as well.  If that thread copies over the poison after all, the
 * content is right; once the range is unregistered it copies nothing.
 *
 * POISON says EFAULT of a page behind the end of a file that was made shorter.  A thread
 * that touches it gets SIGBUS from the kernel, and zeros if the file grows again, as after
 * any ftruncate(2): call the page removed.
 *
 * Without EVENT_UNMAP a part may have been unmapped, or have another mapping over it, without a
 * word: POISON and WRITEPROTECT say ENOENT there.  What lies behind it is still ours.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "failures.h"
#include "fill.h"
#include "populate.h"
#include "put.h"
#include "range.h"
#include "registered.h"
#include "save.h"
#include "seal.h"
#include "slices.h"
#include "space.h"
#include "base/clock.h"
#include "base/tasks.h"
#include "remote/maps.h"

/*
 * Forks that share memory share its states, but poison belongs to one address space: a
 * page poisoned in another space must be poisoned here too.
 */
static uint8_t state_to_poison(struct uffd_range *range, uint64_t page)
{
	return range->content->shared && atomic_load(state_of(range, page)) == UFFD_PAGE_POISONED
		? UFFD_PAGE_POISONED : UFFD_PAGE_ABSENT;
}

/* Poison a run of absent pages; pages in flight, and those that are zeros, are left out. */
static uint64_t poison_slice(const struct slices *all, struct uffd_range *range, uint64_t at,
			     uint64_t end, int *error_ret, uint64_t *done_ret)
{
	struct uffd_fill_result result;
	uint64_t stop, past, length;
	uint8_t expected;
	bool zeros;

	(void)all;
	while (at < end && atomic_load(state_of(range, at)) != state_to_poison(range, at))
		at += range->page_size;
	if (at >= end)
		return end;
	length = uffd_content_stretch(range->content, content_offset(range, at), end - at, &zeros);
	if (zeros)
		return at + length;
	end = at + length;
	expected = state_to_poison(range, at);
	stop = at;
	while (stop < end && atomic_compare_exchange_strong(state_of(range, stop), &expected,
							    UFFD_PAGE_IN_FLIGHT))
		stop += range->page_size;
	if (stop == at)
		return at;	/* just claimed by another thread: look again */
	*error_ret = poison_pages(range, at, stop - at, &result);
	past = at + result.done + result.already_present;
	set_states(range, at, past, UFFD_PAGE_POISONED);
	wake_again(range, at, past);
	*done_ret = result.done;
	if (*error_ret == -EFAULT) {
		unclaim(range, past, past + range->page_size, UFFD_PAGE_REMOVED);
		past += range->page_size;
		*error_ret = 0;
	}
	unclaim(range, past, stop, UFFD_PAGE_ABSENT);
	if (*error_ret == 0 && result.deferred)
		*error_ret = -EAGAIN;
	return past;
}

/* -EBUSY at the first page in flight. */
static uint64_t find_in_flight(const struct slices *all, struct uffd_range *range, uint64_t at,
			       uint64_t end, int *error_ret, uint64_t *done_ret)
{
	*done_ret = 0;
	for (; at < end; at += range->page_size) {
		uint8_t state = atomic_load(state_of(range, at));

		if (uffd_page_is_in_flight(state)) {
			*error_ret = -EBUSY;
			return at;
		}
		/* The thread that had it has given it back. */
		if (state == UFFD_PAGE_ABSENT)
			return poison_slice(all, range, at, end, error_ret, done_ret);
	}
	return at;
}

static uint64_t find_in_flight_only(const struct slices *all, struct uffd_range *range, uint64_t at,
				    uint64_t end, int *error_ret, uint64_t *done_ret)
{
	(void)all;
	*done_ret = 0;
	while (at < end && !uffd_page_is_in_flight(atomic_load(state_of(range, at))))
		at += range->page_size;
	*error_ret = at < end ? -EBUSY : 0;
	return at;
}

/* The thread at this page did not finish in time: poison it. */
static uint64_t poison_in_flight(const struct slices *all, struct uffd_range *range, uint64_t at,
				 uint64_t end, int *error_ret, uint64_t *done_ret)
{
	struct uffd_fill_result result;
	uint8_t state = atomic_load(state_of(range, at));

	(void)all;
	(void)end;
	*done_ret = 0;
	if (!uffd_page_is_in_flight(state))
		return at;
	*error_ret = poison_pages(range, at, range->page_size, &result);
	if (*error_ret == -EFAULT) {
		*error_ret = 0;
		if (atomic_compare_exchange_strong(state_of(range, at), &state, UFFD_PAGE_REMOVED))
			wake_again(range, at, at + range->page_size);
		return at + range->page_size;
	}
	if (*error_ret == 0 && result.deferred)
		*error_ret = -EAGAIN;
	if (*error_ret)
		return at;
	/* If it is present, the fill has come after all: a claimed page has no marker. */
	if (result.done && !atomic_load(&range->space->engine->end.hurried))
		note_failure(range->space->engine, at, range->page_size, -ETIMEDOUT,
			     UFFD_FAILED_STALLED);
	atomic_compare_exchange_strong(state_of(range, at), &state,
				       result.done ? UFFD_PAGE_POISONED : UFFD_PAGE_CLEAN);
	*done_ret = result.done;
	return at + range->page_size;
}

static uint64_t unprotect_slice(const struct slices *all, struct uffd_range *range, uint64_t at,
				uint64_t end, int *error_ret, uint64_t *done_ret)
{
	(void)all;
	*done_ret = 0;
	*error_ret = uffd_shim_writeprotect(range->space->fd, at, end - at, 0);
	return *error_ret ? at : end;
}

/* Pages that are asked for one by one before the gate may be closed. */
#define ASKED_AT_ONCE	4096u

/*
 * Where the next mapping begins; the address itself if that is unknown: of a fork, before Linux
 * 6.11, or without a free descriptor.
 */
static uint64_t next_mapping(const struct uffd_space *space, uint64_t address)
{
	uint64_t start, end, next = address;
	int r, fd = -1;

	if (space->owner_pid)
		fd = uffd_task_open(space->owner_pid, "maps", 0);
	if (fd < 0)
		return address;
	r = uffd_maps_next(fd, address, &start, &end);
	if (r == 0)
		next = start > address ? start : end;
	else if (r == -ENOENT)
		next = UINT64_MAX;
	close(fd);
	return next;
}

/* Look for registered memory behind a page that is not, some way. */
static uint64_t next_registered_page(const struct uffd_range *range, uint64_t address)
{
	uint64_t next = address + range->page_size;
	bool found = false;

	for (unsigned int i = 0; i < ASKED_AT_ONCE && next < range->end; i++) {
		if (is_one_mapping(range, next, next + range->page_size, &found) || found)
			break;
		next += range->page_size;
	}
	return next;
}

/* Skip memory that is not registered, at *offset; returns whether there was any. */
static bool skip_gone(const struct slices *all, uint64_t *offset)
{
	struct uffd_range *range;
	struct access access;
	uint64_t at, next;

	if (!open_access(all->engine, all->ref.space, &access))
		return false;
	range = find_piece(access.space, all->ref.id, *offset, all->ref.start + *offset);
	if (range) {
		at = range->start + (*offset - range->origin);
		next = next_mapping(access.space, at);
		if (next == at)
			next = next_registered_page(range, at);
		*offset += lower(next, range->end) - at;
	}
	close_access(&access);
	return range;
}

/* Work on a piece from *offset on; EAGAIN and ENOMEM are retried. */
static int work_on(struct slices *all, uint64_t *offset, struct patience *patience)
{
	while (*offset < all->end) {
		uint64_t done;
		int r = do_slice(all, offset, &done);

		if (r == 0)
			rest(patience);
		else if (r == -ENOENT && all->work != preserve_slice && skip_gone(all, offset))
			rest(patience);
		else if ((r != -EAGAIN && r != -ENOMEM) || !wait_on(patience))
			return r;
	}
	return 0;
}

/* No page may be in flight when its range is unregistered: its waiters would read zeros. */
static int clear_in_flight(struct slices *all, slice_work find, struct patience *patience)
{
	uint64_t offset = all->offset;
	int r = 0;

	while (r == 0) {
		all->work = find;
		r = work_on(all, &offset, patience);
		if (r != -EBUSY)
			break;
		if (wait_on(patience)) {
			r = 0;
			continue;
		}
		if (patience->is_gentle)
			return -ETIME;
		/* Poison that page, then continue. */
		all->work = poison_in_flight;
		r = do_slice(all, &offset, &(uint64_t){ 0 });
		if (r == -EAGAIN)
			uffd_back_off(patience->attempt++);
	}
	return r;
}

static int seal_absent(struct slices *all, struct patience *patience)
{
	uint64_t offset = all->offset;
	int r;

	all->work = poison_slice;
	r = work_on(all, &offset, patience);
	return r ? r : clear_in_flight(all, find_in_flight, patience);
}

static void note_unsaved_in(const struct slices *all)
{
	struct uffd_range *range;
	struct access access;

	if (!open_access(all->engine, all->ref.space, &access))
		return;
	range = any_piece(access.space, all->ref.id, all->ref.start + all->offset);
	if (range)
		note_unsaved(range);
	close_access(&access);
}

/*
 * Save all pages; skip one that cannot be saved, or whose saving thread does not finish
 * in time.
 */
static int save_all(struct slices *all, const struct piece *piece, struct patience *patience)
{
	uint64_t offset = piece->offset;
	int r;

	while ((r = work_on(all, &offset, patience)) && r != -ENOENT && r != -ESRCH) {
		bool is_stalled = r == -EAGAIN || r == -ENOMEM;

		note_failure(all->engine, piece->ref.start + offset, piece->page_size, r,
			     is_stalled ? UFFD_FAILED_STALLED : UFFD_FAILED_SAVE);
		offset += piece->page_size;
	}
	if (r == -ESRCH)
		note_unsaved_in(all);
	return r;
}

int seal_piece(struct uffd_engine *engine, const struct piece *piece, struct patience *patience)
{
	struct slices all = { engine, piece->ref, piece->offset, piece->end, preserve_slice,
			      preserve_reach, NULL, 0 };
	struct uffd_populate_result populated;
	uint64_t offset = piece->offset;
	int r = 0;

	if (piece->preserves)
		r = save_all(&all, piece, patience);
	all.reach = NULL;
	all.work = unprotect_slice;
	if (r == 0 && piece->mode & UFFDIO_REGISTER_MODE_WP)
		r = work_on(&all, &offset, patience);
	/* The owner may be gone; memory that was unregistered is unprotected. */
	if (r == -ENOENT || r == -ESRCH || !piece->loses_content)
		return 0;
	if (r == 0 && piece->can_poison)
		return seal_absent(&all, patience);
	if (r == 0 && piece->asks && atomic_load(&engine->end.began))
		return -EBUSY;
	if (r == 0)
		r = uffd_engine_populate(engine, &piece->ref, piece->offset,
					 piece->end - piece->offset, 0, &populated);
	return r;
}

int seal_in_flight(struct uffd_engine *engine, const struct piece *piece,
		   struct patience *patience)
{
	struct slices all = { engine, piece->ref, piece->offset, piece->end, NULL, NULL, NULL,
			      0 };

	return piece->loses_content && piece->can_poison
		? clear_in_flight(&all, find_in_flight_only, patience) : 0;
}
