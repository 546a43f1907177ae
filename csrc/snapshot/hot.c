// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/page.h"
#include "dirty/ranges.h"
#include "snapshot/hot.h"

#define IMAGE_PAGE	UINT64_C(4096)
/*
 * A gap between two parts of a file is read with them if it is no longer than this: a separate
 * request costs as much as reading this many bytes.
 */
#define READ_GAP	(4 * IMAGE_PAGE)
/* One call reads no more than the device's readahead or its largest request, seldom less than this. */
#define READ_AT_ONCE	UINT64_C(0x20000)

/* A row of the file of a working set. */
struct row {
	uint64_t page;
	uint32_t pages;
	uint16_t seen, tried;
};

static struct row row_at(const void *rows, uint64_t number)
{
	struct row row;

	memcpy(&row, (const char *)rows + number * UFFD_HOT_ROW_SIZE, sizeof(row));
	return row;
}

/* Checking */

static int by_page(const void *one, const void *other)
{
	const struct row *a = one, *b = other;

	return a->page < b->page ? -1 : a->page > b->page;
}

static int check_row(const struct row *row, uint64_t image_pages, uint32_t recordings)
{
	bool is_inside = row->pages && row->page < image_pages &&
			 row->pages <= image_pages - row->page;

	return is_inside && row->seen && row->seen <= row->tried && row->tried <= recordings
		? 0 : -EINVAL;
}

int uffd_hot_check(const void *rows, uint64_t count, uint64_t image_pages, uint32_t recordings,
		   uint64_t most_pages)
{
	struct row *sorted = malloc((count + 1) * sizeof(*sorted));
	uint64_t total = 0, reached = 0;
	int r = 0;

	if (!sorted)
		return -ENOMEM;
	for (uint64_t i = 0; i < count && r == 0; i++) {
		sorted[i] = row_at(rows, i);
		r = check_row(&sorted[i], image_pages, recordings);
		total += sorted[i].pages;
	}
	if (r == 0 && total > most_pages)
		r = -EINVAL;
	if (r == 0)
		qsort(sorted, count, sizeof(*sorted), by_page);
	for (uint64_t i = 0; i < count && r == 0; i++) {
		if (sorted[i].page < reached)
			r = -EINVAL;
		reached = sorted[i].page + sorted[i].pages;
	}
	free(sorted);
	return r;
}

/* The plan */

struct plan {
	const struct uffd_hot_place *places;
	uint64_t count;
	uint64_t window;
	uint8_t **done;		/* for each place: huge pages that are in it, a bit each; or NULL */
	struct uffd_hot_plan *found;
};

/* The first place that ends behind an offset of the image. */
static uint64_t first_place(const struct plan *plan, uint64_t offset)
{
	uint64_t low = 0, high = plan->count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (plan->places[middle].offset + plan->places[middle].length > offset)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

/* Add a range, in parts no longer than a window: a pause waits for one of them. */
static int note(struct plan *plan, uint64_t begin, uint64_t end, uint64_t memory, uint64_t page_size)
{
	struct uffd_page_ranges *ranges = &plan->found->ranges;
	uint64_t most = higher(plan->window, page_size);
	int r = 0;

	plan->found->bytes += end - begin;
	while (begin < end && r == 0) {
		struct uffd_page_region *last =
			ranges->count ? &ranges->vec[ranges->count - 1] : NULL;
		bool goes_on = last && last->categories == memory && last->end == begin &&
			       last->end - last->start < most;
		uint64_t room = goes_on ? most - (last->end - last->start) : most;
		uint64_t stop = begin + lower(room, end - begin);

		if (goes_on)
			last->end = stop;
		else
			r = uffd_ranges_append_row(ranges, begin, stop, memory);
		begin = stop;
	}
	return r;
}

/* A huge page that several rows touch is filled once. */
static int note_huge(struct plan *plan, uint64_t number, uint64_t begin, uint64_t end)
{
	const struct uffd_hot_place *place = &plan->places[number];
	uint64_t size = place->page_size, first = place->at / size;
	uint64_t past = (place->at + place->length + size - 1) / size;
	int r = 0;

	if (!plan->done[number])
		plan->done[number] = calloc((past - first + 7) / 8, 1);
	if (!plan->done[number])
		return -ENOMEM;
	for (uint64_t page = begin / size; page * size < end && r == 0; page++) {
		uint8_t *bits = &plan->done[number][(page - first) / 8];
		uint8_t bit = (uint8_t)(1u << (page - first) % 8);

		if (!(*bits & bit))
			r = note(plan, page * size, (page + 1) * size, place->memory, size);
		*bits |= bit;
	}
	return r;
}

static int note_row(struct plan *plan, uint64_t offset, uint64_t end)
{
	int r = 0;

	for (uint64_t i = first_place(plan, offset); i < plan->count && r == 0; i++) {
		const struct uffd_hot_place *place = &plan->places[i];
		uint64_t begin = higher(offset, place->offset) - place->offset + place->at;
		uint64_t stop = lower(end, place->offset + place->length);

		if (place->offset >= end)
			break;
		stop = stop - place->offset + place->at;
		r = place->page_size > IMAGE_PAGE
			? note_huge(plan, i, begin, stop)
			: note(plan, begin, stop, place->memory, place->page_size);
	}
	return r;
}

static int note_rows(struct plan *plan, const void *rows, uint64_t count, uint32_t percent)
{
	int r = 0;

	for (uint64_t i = 0; i < count && r == 0; i++) {
		struct row row = row_at(rows, i);

		if (row.seen * 100u < (uint64_t)percent * row.tried)
			continue;
		if (row.page > UINT64_MAX / IMAGE_PAGE - row.pages)
			continue;
		r = note_row(plan, row.page * IMAGE_PAGE, (row.page + row.pages) * IMAGE_PAGE);
	}
	return r;
}

/* Put the ranges of each memory together, in [first, past); `room` has space for them. */
static int group(struct uffd_hot_plan *found, uint64_t first, uint64_t past,
		 struct uffd_page_region *room)
{
	struct uffd_page_region *vec = found->ranges.vec;
	uint64_t kept = first;
	int r = 0;

	while (kept < past && r == 0) {
		uint64_t memory = vec[kept].categories, begin = kept, others = 0;

		for (uint64_t i = begin; i < past; i++) {
			if (vec[i].categories == memory)
				vec[kept++] = vec[i];
			else
				room[others++] = vec[i];
		}
		memcpy(&vec[kept], room, others * sizeof(*room));
		r = uffd_ranges_append_row(&found->windows, begin, kept, memory);
	}
	return r;
}

static int find_windows(struct plan *plan)
{
	struct uffd_page_ranges *ranges = &plan->found->ranges;
	struct uffd_page_region *room;
	uint64_t first = 0;
	int r = 0;

	room = malloc((plan->window / IMAGE_PAGE + 1) * sizeof(*room));
	if (!room)
		return -ENOMEM;
	while (first < ranges->count && r == 0) {
		uint64_t past = first, size = 0;

		while (past < ranges->count && size < plan->window) {
			size += ranges->vec[past].end - ranges->vec[past].start;
			past++;
		}
		r = group(plan->found, first, past, room);
		first = past;
	}
	free(room);
	return r;
}

int uffd_hot_plan(const void *rows, uint64_t count, uint32_t percent,
		  const struct uffd_hot_place *places, uint64_t places_count, uint64_t window,
		  struct uffd_hot_plan *ret)
{
	struct plan plan = { places, places_count, window, NULL, ret };
	int r;

	memset(ret, 0, sizeof(*ret));
	if (!window || window % IMAGE_PAGE)
		return -EINVAL;
	plan.done = calloc(places_count + 1, sizeof(*plan.done));
	if (!plan.done)
		return -ENOMEM;
	r = note_rows(&plan, rows, count, percent);
	if (r == 0)
		r = find_windows(&plan);
	for (uint64_t i = 0; i < places_count; i++)
		free(plan.done[i]);
	free(plan.done);
	return r;
}

void uffd_hot_plan_free(struct uffd_hot_plan *plan)
{
	uffd_pagemap_release(&plan->ranges);
	uffd_pagemap_release(&plan->windows);
}

/* Reading ahead */

static uint64_t first_run(const struct uffd_page_region *runs, uint64_t count, uint64_t offset)
{
	uint64_t low = 0, high = count;

	while (high - low > 1) {
		uint64_t middle = low + (high - low) / 2;

		if (runs[middle].start <= offset)
			low = middle;
		else
			high = middle;
	}
	return low;
}

static int by_file(const void *one, const void *other)
{
	const struct uffd_page_region *a = one, *b = other;

	if (a->categories != b->categories)
		return a->categories < b->categories ? -1 : 1;
	return a->start < b->start ? -1 : a->start > b->start;
}

static void ask_for(int fd, uint64_t start, uint64_t end)
{
	for (; start < end; start += READ_AT_ONCE)
		posix_fadvise(fd, (off_t)start, (off_t)lower(end - start, READ_AT_ONCE),
			      POSIX_FADV_WILLNEED);
}

static void ask(const struct uffd_page_ranges *parts, const int32_t *fds)
{
	uint64_t i = 0;

	while (i < parts->count) {
		struct uffd_page_region part = parts->vec[i++];

		while (i < parts->count && parts->vec[i].categories == part.categories &&
		       parts->vec[i].start <= part.end + READ_GAP) {
			part.end = higher(part.end, parts->vec[i].end);
			i++;
		}
		ask_for(fds[part.categories - 1], part.start, part.end);
	}
}

int uffd_hot_read_ahead(const struct uffd_page_region *ranges, uint64_t count,
			const struct uffd_page_region *runs, uint64_t runs_count, uint64_t length,
			const int32_t *fds, uint64_t fds_count)
{
	/* Rows (offset in the file, end, leaf). */
	struct uffd_page_ranges parts = { 0 };
	int r = 0;

	for (uint64_t i = 0; i < count && r == 0 && runs_count; i++) {
		uint64_t begin = ranges[i].start, end = lower(ranges[i].end, length);
		uint64_t run = first_run(runs, runs_count, begin);

		for (; run < runs_count && runs[run].start < end && r == 0; run++) {
			uint64_t leaf = runs[run].end, from = higher(begin, runs[run].start);
			uint64_t past = run + 1 < runs_count ? runs[run + 1].start : length;
			uint64_t at = runs[run].categories + (from - runs[run].start);

			past = lower(past, end);
			if (leaf && leaf <= fds_count && from < past)
				r = uffd_ranges_append_row(&parts, at, at + (past - from), leaf);
		}
	}
	if (r == 0 && parts.count) {
		qsort(parts.vec, parts.count, sizeof(*parts.vec), by_file);
		ask(&parts, fds);
	}
	free(parts.vec);
	return r;
}
