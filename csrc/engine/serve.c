// SPDX-License-Identifier: MIT
/* Add ranges. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "gate.h"
#include "range.h"
#include "registered.h"
#include "report.h"
#include "serve.h"
#include "space.h"
#include "stats.h"
#include "vacated.h"

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
	/* A page that was never protected may have been written to. */
	uint8_t state = absent ? UFFD_PAGE_ABSENT : UFFD_PAGE_DIRTY;
	struct uffd_pages *pages;

	/* Private memory that was left behind has states of its own. */
	if (spec->is_left && !spec->shared)
		return uffd_pages_create(count, UFFD_PAGE_REMOVED);
	if (other && (spec->shared || !other->is_left))
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
		.is_left = spec->is_left,
	};
	uint64_t length = spec->id ? spec->piece_length : spec->length;
	struct uffd_range *range = NULL;
	int r = uffd_content_create(spec, &like.content);

	if (r)
		return r;
	like.content->space = space->number;
	like.content->forks = atomic_load(&space->engine->forks_followed);
	like.pages = pages_for(space, spec, can_be_absent(&like));
	if (like.pages) {
		range = range_create(space, &like, spec->start, spec->start + length, spec->origin);
		uffd_pages_put(like.pages);
	}
	uffd_content_put(like.content);
	if (!range)
		return -ENOMEM;
	/*
	 * An unmapping of what was here before may be under way, and its event would
	 * take this range out again: wait until it has been read.
	 */
	wait_for_layout(space);
	gate_enter(space);
	r = atomic_load(&space->engine->end.began) ? -ECANCELED
						   : uffd_table_insert(space->table, range);
	if (r == 0 && !spec->id)
		report_added(range);
	if (r == 0 && spec->is_left)
		space->has_left = true;
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

int uffd_engine_note_registered(struct uffd_engine *engine, uint32_t number, uint64_t start,
				uint64_t end)
{
	struct uffd_space *space = space_get(engine, number);
	int r;

	if (!space)
		return -ESRCH;
	/* Wait for the event of an earlier unmapping here, which would unlist it again. */
	wait_for_layout(space);
	gate_enter(space);
	r = list_registered(space, start, end);
	forget_vacated(space, start, end);
	gate_leave(space);
	/* Afterwards no thread treats it as grown. */
	await_work(engine);
	space_put(space);
	return r;
}

int uffd_engine_know_registered(struct uffd_engine *engine, uint32_t number)
{
	struct uffd_space *space = space_get(engine, number);

	if (!space)
		return -ESRCH;
	atomic_store(&space->knows_registered, true);
	space_put(space);
	return 0;
}

int uffd_engine_note_unregistered(struct uffd_engine *engine, uint32_t number, uint64_t start,
				  uint64_t end)
{
	struct uffd_space *space = space_get(engine, number);

	if (!space)
		return -ESRCH;
	gate_enter(space);
	unlist_registered(space, start, end);
	gate_leave(space);
	space_put(space);
	return 0;
}

void uffd_engine_refuse(struct uffd_engine *engine)
{
	atomic_store(&engine->refusing, true);
}
