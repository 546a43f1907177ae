// SPDX-License-Identifier: MIT
/*
 * Work on served pages from outside the loop: at one piece, or at a run of pages in
 * slices, so that faults get between.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "fill.h"
#include "gate.h"
#include "range.h"
#include "slices.h"
#include "space.h"

/* Populating and sealing go through a range in pieces, so that faults get between. */
#define BULK_SLICE		(4u << 20)

bool open_visit(struct uffd_engine *engine, uint32_t number, struct visit *visit)
{
	visit->space = space_get(engine, number);
	if (!visit->space)
		return false;
	visit->phase = begin_work(engine);
	gate_enter(visit->space);
	visit->shard = uffd_table_enter(visit->space->table, current_cpu());
	visit->hold = NULL;
	return true;
}

void shut_visit(struct visit *visit)
{
	let_go(visit->space->table, visit->shard, visit->hold);
	gate_leave(visit->space);
	end_work(visit->space->engine, visit->phase);
	space_put(visit->space);
}

/* How far one piece of work goes, in addresses of the range; 0: it is not there. */
static uint64_t slice_end(const struct uffd_range *range, uint64_t offset, uint64_t end)
{
	uint64_t slice = BULK_SLICE > range->page_size ? BULK_SLICE : range->page_size;
	uint64_t stop = range->start + (offset - range->origin) +
			(end - offset < slice ? end - offset : slice);

	return stop < range->end ? stop : range->end;
}

static struct uffd_range *find_for(struct visit *visit, const struct slices *all, uint64_t offset)
{
	if (atomic_load(&visit->space->gone))
		return NULL;
	return find_piece(visit->space, all->ref.id, offset, all->ref.start + offset);
}

/*
 * A source, or memory of the user's, may hold us up: so what the next slice touches
 * is faulted in while nobody waits for us.  It can go away again before it is used,
 * but not for good.  Returns the offset where that ends.
 */
static uint64_t fault_in_slice(const struct slices *all, uint64_t offset)
{
	struct reach reach = { 0 };
	struct uffd_range *range;
	struct visit visit;
	uint64_t stop = all->end;

	if (!open_visit(all->engine, all->ref.space, &visit))
		return stop;
	range = find_for(&visit, all, offset);
	if (range) {
		uint64_t at = range->start + (offset - range->origin);

		reach.content = uffd_content_get(range->content);
		at = all->reach(range, at, slice_end(range, offset, all->end), &reach);
		stop = content_offset(range, at);
	}
	shut_visit(&visit);
	uffd_fault_in(reach.read, reach.read_length, false);
	uffd_fault_in(reach.write, reach.write_length, true);
	if (reach.content)
		uffd_content_put(reach.content);
	return stop;
}

int do_slice(const struct slices *all, uint64_t *offset, uint64_t *done_ret)
{
	uint64_t limit = all->reach ? fault_in_slice(all, *offset) : all->end, at;
	struct uffd_range *range;
	struct visit visit;
	int error = 0;
	bool gone;

	*done_ret = 0;
	if (!open_visit(all->engine, all->ref.space, &visit))
		return -ESRCH;
	range = find_for(&visit, all, *offset);
	if (range) {
		uint64_t stop = slice_end(range, *offset, limit);

		at = range->start + (*offset - range->origin);
		visit.hold = leave_with(visit.space->table, visit.shard, range, at, stop,
					(uint32_t)syscall(SYS_gettid));
		at = all->work(range, at, stop, &error, done_ret);
		*offset = content_offset(range, at);
	}
	gone = atomic_load(&visit.space->gone);
	shut_visit(&visit);
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
