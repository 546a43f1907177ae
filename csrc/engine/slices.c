// SPDX-License-Identifier: MIT
/*
 * Work on served pages from outside the loop: on one piece, or on a run of pages in
 * slices, so that faults get in between.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fill.h"
#include "gate.h"
#include "page_table.h"
#include "range.h"
#include "slices.h"
#include "space.h"
#include "base/clock.h"

/* The most that one slice covers, so that faults get in between. */
#define BULK_SLICE		(4u << 20)

bool open_access(struct uffd_engine *engine, uint32_t number, struct access *access)
{
	access->space = space_get(engine, number);
	if (!access->space)
		return false;
	access->phase = begin_work(engine);
	gate_enter(access->space);
	access->shard = uffd_table_enter(access->space->table, current_cpu());
	access->hold = NULL;
	return true;
}

void close_access(struct access *access)
{
	let_go(access->space->table, access->shard, access->hold);
	gate_leave(access->space);
	end_work(access->space->engine, access->phase);
	space_put(access->space);
}

int open_piece(struct uffd_engine *engine, const struct uffd_range_ref *ref, struct access *access,
	       struct uffd_range **range_ret)
{
	if (!open_access(engine, ref->space, access))
		return -ESRCH;
	*range_ret = any_piece(access->space, ref->id, ref->start);
	if (*range_ret)
		return 0;
	close_access(access);
	return -ENOENT;
}

/* The end of the slice that begins at `offset`, as an address of the range. */
static uint64_t slice_end(const struct uffd_range *range, uint64_t offset, uint64_t end)
{
	uint64_t slice = BULK_SLICE > range->page_size ? BULK_SLICE : range->page_size;
	uint64_t stop = range->start + (offset - range->origin) +
			(end - offset < slice ? end - offset : slice);

	return stop < range->end ? stop : range->end;
}

static struct uffd_range *find_for(struct access *access, const struct slices *all, uint64_t offset)
{
	if (atomic_load(&access->space->gone))
		return NULL;
	return find_piece(access->space, all->ref.id, offset, all->ref.start + offset);
}

static bool is_there(const struct access *access, const struct uffd_content *content,
		     const struct reach *reach)
{
	if (is_mapped_here(access->space, reach->read, reach->read_length))
		return true;
	return content->kind == UFFD_SOURCE_FILE &&
	       uffd_file_is_cached(&content->file, reach->read - content->file.address,
				   reach->read_length);
}

/*
 * A source, or the user's memory, may block us: so fault in what the next slice touches
 * while no thread waits for us.  It may be paged out again before it is used, but then
 * it can be read again.  Returns the offset up to which it was faulted in.
 */
static uint64_t fault_in_slice(const struct slices *all, uint64_t offset)
{
	struct reach reach = { 0 };
	struct uffd_range *range;
	struct access access;
	uint64_t stop = all->end;

	if (!open_access(all->engine, all->ref.space, &access))
		return stop;
	range = find_for(&access, all, offset);
	if (range) {
		uint64_t at = range->start + (offset - range->origin);

		reach.content = uffd_content_get(range->content);
		at = all->reach(all, range, at, slice_end(range, offset, all->end), &reach);
		stop = content_offset(range, at);
		/* Asking is several times cheaper than faulting in what is there already. */
		if (reach.read_length && is_there(&access, range->content, &reach))
			reach.read_length = 0;
	}
	close_access(&access);
	uffd_fault_in(reach.read, reach.read_length, false);
	uffd_fault_in(reach.write, reach.write_length, true);
	if (reach.overlay_length)
		uffd_overlay_fault_in(reach.content->overlay, reach.overlay_offset,
				      reach.overlay_length);
	if (reach.tail)
		uffd_overlay_fault_in(reach.content->tail, 0, reach.content->page_size);
	if (reach.content)
		uffd_content_put(reach.content);
	return stop;
}

void fault_in_slices(const struct slices *all)
{
	for (uint64_t offset = all->offset; offset < all->end;)
		offset = fault_in_slice(all, offset);
}

int do_slice(const struct slices *all, uint64_t *offset, uint64_t *done_ret)
{
	uint64_t limit = all->reach ? fault_in_slice(all, *offset) : all->end, at;
	struct uffd_range *range;
	struct access access;
	int error = 0;
	bool gone;

	*done_ret = 0;
	if (!open_access(all->engine, all->ref.space, &access))
		return -ESRCH;
	range = find_for(&access, all, *offset);
	if (range) {
		uint64_t stop = slice_end(range, *offset, limit);

		at = range->start + (*offset - range->origin);
		access.hold = leave_with(access.space->table, access.shard, range, at, stop,
					 all->thread_id ? all->thread_id
							: (uint32_t)syscall(SYS_gettid));
		if (access.hold)
			atomic_store(&access.hold->is_call, true);
		at = all->work(all, range, at, stop, &error, done_ret);
		*offset = content_offset(range, at);
	}
	gone = atomic_load(&access.space->gone);
	close_access(&access);
	if (!range)
		return gone ? -ESRCH : -ENOENT;
	return error;
}

int for_slices(const struct slices *all, uint64_t *done_ret, uint64_t *reached_ret)
{
	uint64_t give_up = 0, *offset = reached_ret;
	unsigned int attempt = 0;

	*done_ret = 0;
	*offset = all->offset;
	while (*offset < all->end) {
		uint64_t done;
		int error;

		if (atomic_load(&all->engine->end.began) && !ends(all->engine))
			return -ECANCELED;
		error = do_slice(all, offset, &done);
		*done_ret += done;
		if (done || !error)
			attempt = 0;
		if (error != -EAGAIN && error != -ENOMEM && error)
			return error;
		if (!error)
			continue;
		if (attempt == 0)
			give_up = uffd_now_ns() + all->engine->options.retry_limit_ns;
		else if (uffd_now_ns() > give_up)
			return error;
		uffd_back_off(attempt++);
	}
	return 0;
}
