// SPDX-License-Identifier: MIT
/* Save old content of protected pages to the buffer that `preserve` names. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "failures.h"
#include "page_table.h"
#include "put.h"
#include "range.h"
#include "save.h"
#include "slices.h"
#include "space.h"
#include "stats.h"
#include "uffd_owner.h"

/* Where the memory of a page can be read, and how much of it. */
struct view {
	struct uffd_space *space;
	uint64_t address, length;
};

/*
 * A fork's process is unknown.  The pages it shares are also mapped in the space that
 * was served, though perhaps at another address by now.
 */
static int view_of_served(const struct uffd_range *range, uint64_t at, struct view *view)
{
	uint64_t offset = content_offset(range, at);
	struct uffd_space *space = space_get(range->space->engine, range->content->space);
	const struct uffd_range *piece;
	unsigned int shard;
	uint64_t left;

	if (!space)
		return -ENODATA;
	shard = uffd_table_enter(space->table, current_cpu());
	piece = find_piece(space, range->id, offset, at);
	if (piece) {
		view->space = space;
		view->address = piece->start + (offset - piece->origin);
		left = piece->end - view->address;
		view->length = left < view->length ? left : view->length;
	}
	uffd_table_leave(space->table, shard);
	if (piece)
		return 0;
	space_put(space);
	return -ENODATA;
}

/*
 * A page that is written to can be read.  Of others the owner may have forbidden access
 * (mprotect(2)), and memcpy() would end the process.
 */
static int64_t read_view(const struct view *view, void *target, bool is_written)
{
	int64_t n;

	if (view->space->is_here && !is_written) {
		n = uffd_owner_read(getpid(), view->address, target, view->length);
		if (n != -EPERM && n != -ENOSYS)	/* of a seccomp filter */
			return n;
	}
	if (view->space->is_here) {
		memcpy(target, (const void *)(uintptr_t)view->address, view->length);
		return (int64_t)view->length;
	}
	n = uffd_owner_read(view->space->owner_pid, view->address, target, view->length);
	/*
	 * The pid may belong to another process by now, or the memory may be new
	 * (execve), but only once the memory that the userfaultfd governs is gone.
	 */
	return space_is_dead(view->space) ? -ESRCH : n;
}

/* Returns the bytes saved from the start, in whole pages, or -errno. */
static int64_t save(struct uffd_range *range, uint64_t at, uint64_t length, bool is_written)
{
	const struct uffd_content *content = range->content;
	uint64_t offset = content_offset(range, at);
	void *target = (void *)(uintptr_t)(content->preserve + offset);
	struct view view = { range->space, at, length };
	int64_t n;
	int r;

	if (content->local) {
		memcpy(target, (const void *)(uintptr_t)(content->local + offset), length);
		n = (int64_t)length;
	} else if (range->space->owned) {
		r = view_of_served(range, at, &view);
		if (r)
			return r;
		n = read_view(&view, target, is_written);
		space_put(view.space);
	} else {
		n = read_view(&view, target, is_written);
	}
	if (n > 0)
		n &= ~(int64_t)(range->page_size - 1);
	if (n > 0)
		count(range->space->engine, COUNTER(preserved_pages),
		      (uint64_t)n >> range->page_shift);
	return n ? n : -EFAULT;
}

int save_page(struct uffd_range *range, uint64_t page)
{
	int64_t n = save(range, page, range->page_size, true);

	return n < 0 ? (int)n : 0;
}

uint64_t preserve_reach(const struct slices *all, struct uffd_range *range, uint64_t at,
			uint64_t end, struct reach *reach)
{
	const struct uffd_content *content = range->content;
	uint64_t stop = run_of(range, &at, end, UFFD_PAGE_CLEAN);

	(void)all;
	if (at >= end)
		return end;
	reach->write = content->preserve + content_offset(range, at);
	reach->write_length = stop - at;
	if (content->local) {
		reach->read = content->local + content_offset(range, at);
		reach->read_length = stop - at;
	}
	return stop;
}

/*
 * If the page table says that others removed a page's protection, it may have been
 * written to since.  Save it as it is, and note the loss.
 */
static void check_protection(const struct uffd_range *range, uint64_t at, uint64_t end)
{
	uint64_t entry;

	for (; at < end && read_entries(range, at, 1, &entry); at += range->page_size)
		if (entry & UFFD_PM_PRESENT && !(entry & UFFD_PM_UFFD_WP))
			note_failure(range->space->engine, at, range->page_size, -ENODATA,
				     UFFD_FAILED_SAVE);
}

static uint64_t save_slice(struct uffd_range *range, uint64_t at, uint64_t end, bool unprotect,
			   int *error_ret, uint64_t *done_ret)
{
	uint64_t stop = at, past, limit = PREFETCH_SLICE > range->page_size ? PREFETCH_SLICE
									    : range->page_size;
	uint8_t expected = UFFD_PAGE_CLEAN;
	int64_t n;

	*error_ret = 0;
	while (stop < end && stop - at < limit &&
	       atomic_compare_exchange_strong(state_of(range, stop), &expected,
					      UFFD_PAGE_HELD))
		stop += range->page_size;
	if (stop == at && uffd_page_is_in_flight(expected)) {
		/* A fault is saving this page: we are done only when it is. */
		*error_ret = -EAGAIN;
		return at;
	}
	if (stop == at)
		return at + range->page_size;
	check_protection(range, at, stop);
	n = save(range, at, stop - at, false);
	past = n > 0 ? at + (uint64_t)n : at;
	/* Pages that could not be saved stay protected; their writers fault again. */
	unclaim(range, past, stop, UFFD_PAGE_CLEAN);
	if (n < 0) {
		*error_ret = (int)n;
		return at;
	}
	/* If this fails with EAGAIN the pages stay protected, which is harmless. */
	if (unprotect)
		uffd_shim_writeprotect(range->space->fd, at, past - at,
				       UFFDIO_WRITEPROTECT_MODE_DONTWAKE);
	set_states(range, at, past, unprotect ? UFFD_PAGE_DIRTY : UFFD_PAGE_SAVED);
	/* Writers that faulted in the meantime wait for this wake. */
	wake_again(range, at, past);
	*done_ret = past - at;
	return past;
}

uint64_t preserve_slice(const struct slices *all, struct uffd_range *range, uint64_t at,
			uint64_t end, int *error_ret, uint64_t *done_ret)
{
	(void)all;
	return save_slice(range, at, end, false, error_ret, done_ret);
}

static uint64_t preserve_and_free_slice(const struct slices *all, struct uffd_range *range,
					uint64_t at, uint64_t end, int *error_ret, uint64_t *done_ret)
{
	(void)all;
	return save_slice(range, at, end, true, error_ret, done_ret);
}

int uffd_engine_preserve(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, uint32_t unprotect,
			 uint64_t *saved_ret, uint64_t *reached_ret)
{
	struct uffd_range *range;
	struct access access;
	bool can;
	int r;

	*saved_ret = 0;
	*reached_ret = offset;
	r = open_piece(engine, ref, &access, &range);
	if (r)
		return r;
	can = range->content->preserve;
	close_access(&access);
	if (!can)
		return -EINVAL;
	return for_slices(&(struct slices){ engine, *ref, offset, offset + length,
					    unprotect ? preserve_and_free_slice : preserve_slice,
					    preserve_reach, NULL, 0 },
			  saved_ret, reached_ret);
}
