// SPDX-License-Identifier: MIT
/*
 * Fill all that has content, in a range and its forks.
 *
 * A restored process reserves far more memory than its image has pages for: filling that
 * with zeros would use up the machine's memory.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "alloc.h"
#include "load.h"
#include "range.h"
#include "slices.h"
#include "spaces.h"
#include "base/clock.h"

/* The piece that begins first at or behind an offset. */
static struct uffd_range *next_piece(struct uffd_space *space, uint64_t id, uint64_t offset)
{
	struct uffd_range *range, *found = NULL;

	for (range = uffd_table_next(space->table, 0); range;
	     range = uffd_table_next(space->table, range->end))
		if (range->space == space && range->id == id && range->origin >= offset &&
		    (!found || range->origin < found->origin))
			found = range;
	return found;
}

/*
 * Move *offset to the next page that has content, and set *past_ret behind the run of
 * such pages.  Returns false if there are none before `end`.
 */
static bool next_content(struct uffd_space *space, const struct uffd_range_ref *ref,
			 uint64_t *offset, uint64_t end, uint64_t *past_ret)
{
	while (*offset < end) {
		struct uffd_range *range =
			find_piece(space, ref->id, *offset, ref->start + *offset);
		uint64_t limit, length;
		bool zeros;

		if (!range)
			range = next_piece(space, ref->id, *offset);
		if (!range || range->origin >= end)
			return false;
		if (*offset < range->origin)
			*offset = range->origin;
		limit = range->origin + (range->end - range->start);
		limit = limit < end ? limit : end;
		length = uffd_content_stretch(range->content, *offset, limit - *offset, &zeros);
		*past_ret = *offset + length;
		if (!zeros)
			return true;
		*offset = *past_ret;
	}
	return false;
}

static int find_content(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			uint64_t *offset, uint64_t end, uint64_t *past_ret)
{
	struct access access;
	int r = -ESRCH;

	if (!open_access(engine, ref->space, &access))
		return -ESRCH;
	if (!atomic_load(&access.space->gone))
		r = next_content(access.space, ref, offset, end, past_ret) ? 0 : -ENODATA;
	close_access(&access);
	return r;
}

/*
 * Memory that was moved is found again once its event is read.  If the kernel keeps saying
 * that it is not registered, it never was.
 */
static bool may_look_again(struct uffd_engine *engine, uint64_t *give_up, unsigned int *attempt)
{
	if (*attempt == 0)
		*give_up = uffd_now_ns() + engine->options.retry_limit_ns;
	else if (uffd_now_ns() > *give_up)
		return false;
	uffd_back_off((*attempt)++);
	return true;
}

static int load_in(struct uffd_engine *engine, const struct uffd_range_ref *ref, uint64_t offset,
		   uint64_t end, uint64_t chunk, struct uffd_populate_result *result)
{
	uint64_t past, give_up = 0;
	unsigned int attempt = 0;
	int r;

	while ((r = find_content(engine, ref, &offset, end, &past)) == 0) {
		struct uffd_populate_result part;

		r = uffd_engine_populate(engine, ref, offset, past - offset, chunk, &part);
		result->filled += part.filled;
		if (r == -ENOENT && may_look_again(engine, &give_up, &attempt))
			continue;
		if (r) {
			result->failed_at = part.failed_at;
			return r;
		}
		offset = past;
		attempt = 0;
	}
	return r == -ENODATA ? 0 : r;
}

int uffd_engine_load(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, uint64_t chunk,
		     struct uffd_populate_result *result_ret)
{
	struct uffd_populate_result there;
	size_t found, i;
	uint32_t *forks;
	int r, other;

	*result_ret = (struct uffd_populate_result){ 0 };
	r = load_in(engine, ref, offset, offset + length, chunk, result_ret);
	if (r && r != -ESRCH)
		return r;
	/* A fork that is not looked at would read zeros later. */
	other = list_forks(engine, &forks, &found);
	if (other)
		r = other;
	for (i = 0; i < found && (!r || r == -ESRCH); i++) {
		struct uffd_range_ref fork = { forks[i], ref->id, ref->start };

		there = (struct uffd_populate_result){ 0 };
		other = load_in(engine, &fork, offset, offset + length, chunk, &there);
		result_ret->filled += there.filled;
		if (other && other != -ESRCH) {
			result_ret->failed_at = there.failed_at;
			r = other;
		}
	}
	uffd_free(forks);
	return r;
}
