// SPDX-License-Identifier: MIT
/*
 * Memory that a mapping has grown by.
 *
 * It is registered without a call of UFFDIO_REGISTER, and it is in one mapping with a piece
 * that ends before it.  Fill its pages with zeros, or with the file's content: the source
 * has nothing for them.  The kernel may also merge a piece's mapping with memory that was
 * registered next to it, and the faults there are not ours to resolve.  The list of
 * registered memory (registered.c) tells the two apart.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "grown.h"
#include "page_table.h"
#include "put.h"
#include "registered.h"
#include "stats.h"

/* The end of user memory (x86-64, unless more was asked for). */
#define USER_END	UINT64_C(0x7ffffffff000)

/* Whether [the last page of a piece, end) is one mapping. */
static int is_one_with(const struct uffd_range *piece, uint64_t end, bool *one_ret)
{
	return is_one_mapping(piece, piece->end - piece->page_size, end, one_ret);
}

static enum outcome put_grown(struct uffd_range *piece, uint64_t page, enum uffd_fault_kind kind)
{
	struct uffd_engine *engine = piece->space->engine;
	struct uffd_fill_result result = { 0 };
	uint64_t entry;
	int r;

	if (kind == UFFD_KIND_WP)
		r = uffd_shim_writeprotect(piece->space->fd, page, piece->page_size, 0);
	else if (kind == UFFD_KIND_MINOR)
		r = put_continue(piece, page, piece->page_size, FILL_MINOR, &result);
	else
		r = put_zeros(piece, page, piece->page_size, FILL_MISSING, &result);
	if (r == -EAGAIN || r == -ENOMEM || (r == 0 && result.deferred))
		return OUTCOME_DEFER;
	if (r == -ENOENT || r == -ESRCH) {
		count(engine, COUNTER(layout_changed), 1);
		return OUTCOME_GONE;
	}
	if (r)
		return OUTCOME_STRAY;
	if (result.already_present) {
		/* A fill also fails with EEXIST if no huge page is free. */
		if (piece->page_size > BASE_PAGE && kind == UFFD_KIND_MISSING &&
		    read_entries(piece, page, 1, &entry) && !(entry & UFFD_PM_PRESENT))
			return OUTCOME_DEFER;
		wake_again(piece, page, page + piece->page_size);
		count(engine, COUNTER(already_present), 1);
		return OUTCOME_PRESENT;
	}
	if (result.done)
		count(engine, COUNTER(filled_pages), 1);
	return OUTCOME_RESOLVED;
}

enum outcome resolve_grown(struct uffd_table *table, uint64_t address, enum uffd_fault_kind kind)
{
	struct uffd_range *piece = uffd_table_before(table, address);
	uint64_t page;
	bool one;
	int r;

	if (!piece || address >= USER_END || is_registered(piece->space, address))
		return OUTCOME_STRAY;
	page = address & ~(piece->page_size - 1);
	r = is_one_with(piece, page + piece->page_size, &one);
	if (r)
		return r == -EAGAIN ? OUTCOME_DEFER : OUTCOME_GONE;
	return one ? put_grown(piece, page, kind) : OUTCOME_STRAY;
}

/* Find the end of a piece's mapping, up to `limit`. */
static uint64_t end_of_mapping(const struct uffd_range *piece, uint64_t limit)
{
	uint64_t end = piece->end, step = piece->page_size;
	bool one = true;

	while (one && limit - end >= step && is_one_with(piece, end + step, &one) == 0)
		if (one)
			end += step, step *= 2;
	for (; step >= piece->page_size; step /= 2)
		if (limit - end >= step && is_one_with(piece, end + step, &one) == 0 && one)
			end += step;
	return end;
}

void unregister_grown(struct uffd_range *range)
{
	struct uffd_space *space = range->space;
	struct uffd_range *next;
	uint64_t limit, end;

	if (is_registered(space, range->end))
		return;
	limit = next_registered(space, range->end, USER_END);
	next = uffd_table_next(space->table, range->end);
	if (next && next->start < limit)
		limit = next->start;
	end = range->end < limit ? end_of_mapping(range, limit) : range->end;
	if (end > range->end)
		uffd_shim_unregister(space->fd, range->end, end - range->end);
}
