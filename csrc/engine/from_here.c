// SPDX-License-Identifier: MIT
/*
 * Fill absent pages whose content is here, as work on slices: all of them, or those of ranges
 * that are close to each other.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "failures.h"
#include "from_here.h"
#include "gate.h"
#include "put.h"
#include "resolve.h"

/* Inside the gate: a thread that wants to close it waits for so much to be filled. */
#define GATE_STEP		(64u << 10)

static uint64_t fill_step(const struct slices *all, struct uffd_range *range, uint64_t at,
			  uint64_t end, enum fill_for why, int *error_ret, uint64_t *done_ret)
{
	uint64_t before = atomic_load(&all->engine->turned_away), page;
	struct fill_run run = fill_absent(range, at, end, why);

	wake_turned_away(range, run.from, run.past, before);
	page = run.from;
	*error_ret = run.error;
	*done_ret = run.filled;
	/* CONTINUE alone needs no free page. */
	if (!is_huge(range) || !(range->mode & UFFDIO_REGISTER_MODE_MISSING))
		return run.past;
	/* Found present by the fill, and still absent: no huge page is free for it. */
	while (page < run.past && atomic_load(state_of(range, page)) != UFFD_PAGE_ABSENT)
		page += range->page_size;
	if (page < run.past)
		*error_ret = -ENOMEM;
	return page;
}

static uint64_t fill_part(const struct slices *all, struct uffd_range *range, uint64_t at,
			  uint64_t end, enum fill_for why, int *error_ret, uint64_t *done_ret)
{
	uint64_t step = !has_gate(range->space) ? end - at : higher(GATE_STEP, range->page_size);

	do {
		uint64_t done = 0;

		at = fill_step(all, range, at, at + lower(step, end - at), why, error_ret, &done);
		*done_ret += done;
	} while (at < end && !*error_ret && !gate_is_wanted(range->space));
	return at;
}

uint64_t fill_slice(const struct slices *all, struct uffd_range *range, uint64_t at, uint64_t end,
		    int *error_ret, uint64_t *done_ret)
{
	return fill_part(all, range, at, end, FILL_AHEAD, error_ret, done_ret);
}

/* Whether the source's file has all of [offset, end), apart from the page in which it ends. */
static bool is_long_enough(const struct uffd_range *range, uint64_t offset, uint64_t end)
{
	uint64_t whole = lower(end, range->content->length);

	return offset < whole &&
	       uffd_content_covered(range->content, offset, whole - offset) == whole - offset;
}

/* The first offset of a range, or the one behind it, as the served range counts. */
static uint64_t word_of(const struct near_ranges *group, uint64_t index, uint64_t column)
{
	return group->base + group->words[index * group->width + column];
}

/* Note what was copied from [offset, end) of a file that was cut meanwhile: it may be zeros. */
static void note_cut(const struct uffd_range *range, const struct near_ranges *group,
		     uint64_t offset, uint64_t end)
{
	uint64_t whole = lower(end, range->content->length), cut;

	if (offset >= whole)
		return;
	cut = offset + uffd_content_covered(range->content, offset, whole - offset);
	for (uint64_t i = 0; cut < whole && i < group->count; i++) {
		uint64_t first = higher(word_of(group, i, 0), cut);
		uint64_t past = lower(word_of(group, i, 1), whole);

		if (first < past)
			note_failure(range->space->engine, range->start + (first - range->origin),
				     past - first, -ENODATA, UFFD_FAILED_SOURCE);
	}
}

/*
 * Fill the ranges of a group, whose source is a file.  Asking how long that is costs much beside
 * copying a page, so it is done once for all, before and afterwards.
 */
uint64_t fill_group(const struct slices *all, struct uffd_range *range, uint64_t at, uint64_t end,
		    int *error_ret, uint64_t *done_ret)
{
	uint64_t from = content_offset(range, at), limit = content_offset(range, end);
	const struct near_ranges *group = all->context;
	uint64_t offset = from, stop, i = 0;
	bool is_checked = range->mode & UFFDIO_REGISTER_MODE_MISSING &&
			  is_long_enough(range, from, limit);

	while (!*error_ret) {
		while (i < group->count && word_of(group, i, 1) <= offset)
			i++;
		/* Memory between two ranges need not be there. */
		offset = i < group->count ? higher(offset, word_of(group, i, 0)) : all->end;
		if (offset >= limit)
			break;
		stop = lower(word_of(group, i, 1), limit);
		at = range->start + (offset - range->origin);
		at = fill_part(all, range, at, at + (stop - offset),
			       is_checked ? FILL_CHECKED : FILL_AHEAD, error_ret, done_ret);
		offset = content_offset(range, at);
		if (offset < stop)
			break;
	}
	if (is_checked)
		note_cut(range, group, from, lower(offset, limit));
	/* The next attempt finds that the file lacks this page. */
	if (*error_ret == -EFAULT && is_checked && !is_long_enough(range, offset, limit))
		*error_ret = 0;
	return range->start + (offset - range->origin);
}
