// SPDX-License-Identifier: MIT
/* Ranges: put in, and worked on from outside the step. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "alloc.h"
#include "core.h"

/* Populating and sealing go through a range in pieces, so that faults get between. */
#define BULK_SLICE		(4u << 20)

static int ensure_zeros(struct uffd_engine *engine, uint64_t page_size)
{
	const void *expected = NULL;
	void *zeros;

	if (page_size <= ZEROS_SIZE || atomic_load(&engine->huge_zeros))
		return 0;
	zeros = mmap(NULL, HUGE_ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		     -1, 0);
	if (zeros == MAP_FAILED)
		return -errno;
	if (!atomic_compare_exchange_strong(&engine->huge_zeros, &expected, zeros))
		munmap(zeros, HUGE_ZEROS_SIZE);
	return 0;
}

static struct uffd_pages *pages_for(struct uffd_space *space, const struct uffd_range_spec *spec,
				    bool absent)
{
	struct uffd_range *other = spec->id ? any_piece(space, spec->id, spec->start) : NULL;
	uint64_t count = spec->length / spec->page_size;
	/* Nobody knows of a page that was never protected whether it was written to. */
	uint8_t state = absent ? UFFD_PAGE_ABSENT : UFFD_PAGE_DIRTY;
	struct uffd_pages *pages;

	if (other)
		return uffd_pages_get(other->pages);
	if (spec->states_fd < 0)
		return uffd_pages_create(count, state);
	pages = uffd_pages_map(spec->states_fd, spec->states_offset, count);
	if (pages && !spec->id)
		memset((void *)pages->state, state, count);
	return pages;
}

static int add_range(struct uffd_space *space, const struct uffd_range_spec *spec, uint64_t id)
{
	struct uffd_range like = {
		.page_size = spec->page_size,
		.page_shift = (uint32_t)__builtin_ctzll(spec->page_size),
		.mode = spec->mode,
		.id = id,
	};
	uint64_t length = spec->id ? spec->piece_length : spec->length;
	struct uffd_range *range = NULL;
	int r = uffd_content_create(spec, &like.content);

	if (r)
		return r;
	like.content->space = space->number;
	like.pages = pages_for(space, spec, can_be_absent(&like));
	if (like.pages) {
		range = range_create(space, &like, spec->start, spec->start + length, spec->origin);
		uffd_pages_put(like.pages);
	}
	uffd_content_put(like.content);
	if (!range)
		return -ENOMEM;
	/*
	 * An unmapping of what was here before may be under way: its event, which
	 * would take this range out again, is read before the layout is still.
	 */
	wait_for_layout(space);
	gate_enter(space);
	r = atomic_load(&space->engine->end.began) ? -ECANCELED
						   : uffd_table_insert(space->table, range);
	if (r == 0 && !spec->id)
		report_added(range);
	gate_leave(space);
	if (r)
		range_free(range);
	return r;
}

int uffd_engine_add(struct uffd_engine *engine, uint32_t number,
		    const struct uffd_range_spec *spec, uint64_t *id_ret)
{
	struct uffd_space *space = space_get(engine, number);
	int r;

	*id_ret = spec->id ? spec->id : atomic_fetch_add(&engine->next_id, 1);
	if (atomic_load(&engine->next_id) <= spec->id)
		atomic_store(&engine->next_id, spec->id + 1);
	if (!space)
		return -ESRCH;
	r = ensure_zeros(engine, spec->page_size);
	if (r == 0)
		r = add_range(space, spec, *id_ret);
	space_put(space);
	return r;
}

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

int uffd_engine_set_ioctls(struct uffd_engine *engine, uint32_t number, uint64_t id,
			   uint64_t start, uint64_t ioctls)
{
	struct uffd_range *range;
	struct visit visit;

	if (!open_visit(engine, number, &visit))
		return -ESRCH;
	range = any_piece(visit.space, id, start);
	if (range)
		__atomic_store_n(&range->ioctls, ioctls, __ATOMIC_RELAXED);
	shut_visit(&visit);
	return range ? 0 : -ENOENT;
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
	return find_piece(visit->space, all->id, offset, all->start + offset);
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

	if (!open_visit(all->engine, all->number, &visit))
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
	if (!open_visit(all->engine, all->number, &visit))
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

/*
 * The ioctl wakes whoever waits, before the pages' states say that they are there;
 * a thread that faults again in between was taken for one that waits for us.
 */
void wake_again(struct uffd_range *range, uint64_t at, uint64_t end)
{
	if (at < end)
		uffd_shim_wake(range->space->fd, at, end - at);
}

/* The first run of pages in this state. */
uint64_t run_of(struct uffd_range *range, uint64_t *at, uint64_t end, uint8_t state)
{
	uint64_t stop;

	while (*at < end && atomic_load(state_of(range, *at)) != state)
		*at += range->page_size;
	for (stop = *at; stop < end && atomic_load(state_of(range, stop)) == state;)
		stop += range->page_size;
	return *at < end ? stop : end;
}

static uint64_t fill_reach(struct uffd_range *range, uint64_t at, uint64_t end,
			   struct reach *reach)
{
	const struct uffd_content *content = range->content;
	uint64_t stop = run_of(range, &at, end, UFFD_PAGE_ABSENT);
	uint64_t offset = content_offset(range, at), length = stop - at;

	if (at >= end)
		return end;
	if (content->writes_cache) {
		reach->write = content->local + offset;
		reach->write_length = length;
	}
	if (offset < content->length) {
		reach->read = uffd_content_address(content, offset);
		reach->read_length =
			length < content->length - offset ? length : content->length - offset;
	}
	return stop;
}

static uint64_t fill_slice(struct uffd_range *range, uint64_t at, uint64_t end, int *error_ret,
			   uint64_t *done_ret)
{
	struct fill_run run = fill_absent(range, at, end);

	wake_again(range, run.from, run.past);
	*error_ret = run.error;
	*done_ret = run.filled;
	return run.past;
}

int uffd_engine_populate(struct uffd_engine *engine, uint32_t number, uint64_t id,
			 uint64_t start, uint64_t offset, uint64_t length, uint64_t chunk,
			 struct uffd_populate_result *result_ret)
{
	const struct serving serving = { .space = number, .id = id, .start = start };
	bool absent = false, by_request = false;
	struct uffd_range *range;
	uint64_t page_size = 0, reached;
	struct visit visit;

	*result_ret = (struct uffd_populate_result){ 0 };
	if (!open_visit(engine, number, &visit))
		return -ESRCH;
	range = any_piece(visit.space, id, start);
	if (range) {
		absent = can_be_absent(range);
		by_request = needs_request(range);
		page_size = range->page_size;
	}
	shut_visit(&visit);
	if (!range)
		return -ENOENT;
	if (!absent)
		return 0;
	if (by_request)
		return populate_by_request(engine, &serving, page_size, offset, offset + length,
					   chunk, result_ret);
	return for_slices(&(struct slices){ engine, number, id, start, offset, offset + length,
					    fill_slice, fill_reach },
			  &result_ret->filled, &reached);
}

void uffd_engine_refuse(struct uffd_engine *engine)
{
	atomic_store(&engine->refusing, true);
}
