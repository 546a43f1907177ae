// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "base/page.h"
#include "dirty/ranges.h"
#include "snapshot/chain.h"

/* A row of the file `runs`. */
struct row {
	uint64_t start, length, state, offset, stored, checksum;
};

struct walk {
	const struct uffd_chain_table *tables;
	uint64_t depth;
	uint64_t base;
	uint64_t piece;
	struct uffd_chain *found;
};

/* The row, or NULL if there is none: the last one that was appended. */
static struct uffd_page_region *last_of(struct uffd_page_ranges *ranges)
{
	return ranges->count ? &ranges->vec[ranges->count - 1] : NULL;
}

static int note_run(struct walk *walk, uint64_t start, uint64_t leaf, uint64_t offset)
{
	struct uffd_page_region *last = last_of(&walk->found->runs);
	uint64_t at = start - walk->base;

	/* Zeros continue the last row whatever their offset. */
	if (last && last->end == leaf &&
	    (!leaf || last->categories + (at - last->start) == offset))
		return 0;
	return uffd_ranges_append_row(&walk->found->runs, at, leaf, offset);
}

static int note_other(struct walk *walk, uint64_t start, uint64_t end, uint64_t state)
{
	struct uffd_page_region *last = last_of(&walk->found->others);

	if (last && last->end == start && last->categories == state) {
		last->end = end;
		return 0;
	}
	return uffd_ranges_append_row(&walk->found->others, start, end, state);
}

/* Add data to the last piece as far as it has room, and begin others. */
static int note_data(struct walk *walk, uint64_t start, uint64_t end)
{
	struct uffd_page_ranges *pieces = &walk->found->pieces;
	int r = 0;

	walk->found->data_bytes += end - start;
	while (start < end && r == 0) {
		struct uffd_page_region *last = last_of(pieces);
		bool fits = last && last->categories < walk->piece &&
			    start - last->end < walk->piece;
		uint64_t room = walk->piece - (fits ? last->categories : 0);
		uint64_t stop = end - start < room ? end : start + room;

		if (fits) {
			last->categories += stop - start;
			last->end = stop;
		} else {
			r = uffd_ranges_append_row(pieces, start, stop, stop - start);
		}
		start = stop;
	}
	return r;
}

static int note(struct walk *walk, const struct row *row, uint64_t table, uint64_t start,
		uint64_t end)
{
	uint64_t state = row ? row->state : UFFD_CHAIN_UNMAPPED;
	int r;

	if (state == UFFD_CHAIN_DATA) {
		walk->found->is_packed |= row->stored < row->length;
		r = note_run(walk, start, table + 1, row->offset + (start - row->start));
		return r ? r : note_data(walk, start, end);
	}
	r = note_run(walk, start, 0, 0);
	if (r || state == UFFD_CHAIN_ZERO)
		return r;
	return note_other(walk, start, end, state);
}

static uint64_t end_of(const struct row *row)
{
	return row->start + row->length;
}

/* The first row that ends behind `start`. */
static uint64_t first_row(const struct row *rows, uint64_t count, uint64_t start)
{
	uint64_t low = 0, high = count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (end_of(&rows[middle]) > start)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

static int resolve(struct walk *walk, uint64_t table, uint64_t start, uint64_t end)
{
	const struct row *rows = (const struct row *)walk->tables[table].rows;
	uint64_t count = walk->tables[table].count;
	uint64_t i = first_row(rows, count, start);
	int r = 0;

	for (; r == 0 && start < end && i < count && rows[i].start < end; i++) {
		const struct row *row = &rows[i];
		uint64_t stop = end_of(row) < end ? end_of(row) : end;

		if (row->start > start) {
			r = note(walk, NULL, table, start, row->start);
			start = row->start;
		}
		if (r == 0 && row->state != UFFD_CHAIN_PARENT)
			r = note(walk, row, table, start, stop);
		else if (r == 0 && table + 1 < walk->depth)
			r = resolve(walk, table + 1, start, stop);
		else if (r == 0)
			r = -EINVAL;
		start = stop;
	}
	if (r == 0 && start < end)
		r = note(walk, NULL, table, start, end);
	return r;
}

int uffd_chain_resolve(const struct uffd_chain_table *tables, uint64_t depth, uint64_t start,
		       uint64_t end, uint64_t piece, struct uffd_chain *ret)
{
	struct walk walk = { tables, depth, start, piece, ret };

	memset(ret, 0, sizeof(*ret));
	if (!depth || start >= end || !piece)
		return -EINVAL;
	return resolve(&walk, 0, start, end);
}

static bool is_stored(const struct row *row, uint64_t pages_length, uint64_t chunk)
{
	return row->length <= chunk && row->stored && row->stored <= row->length &&
	       row->stored <= pages_length && row->offset <= pages_length - row->stored;
}

void uffd_chain_free(struct uffd_chain *chain)
{
	uffd_pagemap_release(&chain->runs);
	uffd_pagemap_release(&chain->others);
	uffd_pagemap_release(&chain->pieces);
}

uint64_t uffd_chain_first_bad(const uint64_t *rows, uint64_t count, uint64_t pages_length,
			      uint64_t chunk)
{
	uint64_t reached = 0;

	for (uint64_t i = 0; i < count; i++) {
		const struct row *row = (const struct row *)rows + i;

		if (row->start < reached || !row->length ||
		    row->start > UINT64_MAX - row->length || (row->start | row->length) % BASE_PAGE ||
		    !row->state || row->state > UFFD_CHAIN_LAST ||
		    (row->state == UFFD_CHAIN_DATA && !is_stored(row, pages_length, chunk)))
			return i;
		reached = row->start + row->length;
	}
	return count;
}
