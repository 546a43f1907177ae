// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/page.h"
#include "dirty/ranges.h"
#include "snapshot/owed.h"

/* Cuts by changes of the layout, before the pieces need more memory. */
#define SPARE_PIECES 64u

/* All states, one byte for each page: a mapping for each part would be a page for each. */
static int new_states(struct uffd_owed *owed, const struct uffd_image_piece *parts, uint64_t count)
{
	void *states;

	for (uint64_t i = 0; i < count; i++)
		owed->states_length += (parts[i].end - parts[i].start) / BASE_PAGE;
	if (!owed->states_length)
		return 0;
	/* Untouched pages of it cost nothing: a reservation of terabytes has states too. */
	states = mmap(NULL, owed->states_length, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (states == MAP_FAILED)
		return -ENOMEM;
	owed->states = states;
	return 0;
}

/* Set pages as owed, or as not owed. */
static void set(struct uffd_owed *owed, const struct uffd_page_region *range, bool is_owed)
{
	for (uint64_t at = range->start; at < range->end;) {
		const struct uffd_owed_piece *piece = uffd_places_from(&owed->places, at);
		uint64_t first, pages;

		if (!piece || piece->start >= range->end)
			break;
		first = higher(at, piece->start);
		at = lower(range->end, piece->end);
		pages = (at - first) / BASE_PAGE;
		memset((void *)(piece->states + (first - piece->start) / BASE_PAGE),
		       is_owed ? UFFD_OWED_YES : UFFD_OWED_NOT, pages);
		owed->left += is_owed ? pages : -pages;
	}
}

static void set_all(struct uffd_owed *owed, const struct uffd_page_ranges *ranges, bool is_owed)
{
	for (uint64_t i = 0; i < ranges->count; i++)
		set(owed, &ranges->vec[i], is_owed);
}

int uffd_owed_init(struct uffd_owed *owed, const struct uffd_image_piece *parts,
		   uint64_t parts_count, const struct uffd_page_region *pages, uint64_t count)
{
	uint64_t at = 0;
	int ret;

	*owed = (struct uffd_owed){ 0 };
	ret = new_states(owed, parts, parts_count);
	if (!ret)
		ret = uffd_places_init(&owed->places, parts_count + SPARE_PIECES);
	owed->parts = calloc(parts_count + 1, sizeof(*owed->parts));
	if (!owed->parts)
		ret = -ENOMEM;
	for (uint64_t i = 0; !ret && i < parts_count; i++) {
		_Atomic uint8_t *states = owed->states + at;

		at += (parts[i].end - parts[i].start) / BASE_PAGE;
		owed->parts[owed->parts_count++] = (struct uffd_owed_part){ parts[i], states };
		uffd_places_add(&owed->places, (struct uffd_owed_piece){
						       .start = parts[i].start,
						       .end = parts[i].end,
						       .offset = parts[i].offset,
						       .states = states,
					       });
	}
	for (uint64_t i = 0; !ret && i < count; i++)
		set(owed, &pages[i], true);
	if (ret)
		uffd_owed_deinit(owed);
	return ret;
}

bool uffd_owed_is_of(const struct uffd_owed *owed, const struct uffd_image_piece *parts,
		     uint64_t count)
{
	bool same = owed->parts && owed->parts_count == count;

	for (uint64_t i = 0; same && i < count; i++) {
		const struct uffd_image_piece *at = &owed->parts[i].at;

		same = at->start == parts[i].start && at->end == parts[i].end &&
		       at->offset == parts[i].offset;
	}
	return same;
}

int uffd_owed_change(struct uffd_owed *owed, const struct uffd_page_ranges *before,
		     const struct uffd_page_region *pages, uint64_t count)
{
	struct uffd_page_ranges more = { 0 }, less = { 0 };
	int ret = uffd_ranges_subtract(pages, count, before->vec, before->count, &more);

	if (!ret)
		ret = uffd_ranges_subtract(before->vec, before->count, pages, count, &less);
	if (!ret) {
		set_all(owed, &less, false);
		set_all(owed, &more, true);
	}
	uffd_pagemap_release(&more);
	uffd_pagemap_release(&less);
	return ret;
}

void uffd_owed_deinit(struct uffd_owed *owed)
{
	if (owed->states)
		munmap((void *)owed->states, owed->states_length);
	free(owed->parts);
	uffd_places_deinit(&owed->places);
	*owed = (struct uffd_owed){ 0 };
}

uint64_t uffd_owed_next(struct uffd_owed *owed, uint64_t address, uint64_t end, uint64_t most,
			struct uffd_owed_piece **piece_ret, uint64_t *address_ret)
{
	struct uffd_owed_piece *piece;

	for (; (piece = uffd_places_from(&owed->places, address)) && piece->start < end;
	     address = piece->end) {
		uint64_t first = (higher(address, piece->start) - piece->start) / BASE_PAGE;
		uint64_t last = (lower(end, piece->end) - piece->start) / BASE_PAGE;
		const uint8_t *states = (const uint8_t *)piece->states;
		const uint8_t *found = memchr(states + first, UFFD_OWED_YES, last - first);
		uint64_t pages = 0;

		if (!found)
			continue;
		first = (uint64_t)(found - states);
		while (pages < most && first + pages < last &&
		       states[first + pages] == UFFD_OWED_YES)
			pages++;
		*piece_ret = piece;
		*address_ret = piece->start + first * BASE_PAGE;
		return pages;
	}
	return 0;
}

uint64_t uffd_owed_around(struct uffd_owed *owed, uint64_t address, uint64_t most,
			  struct uffd_owed_piece **piece_ret, uint64_t *address_ret)
{
	struct uffd_owed_piece *piece = uffd_places_from(&owed->places, address);
	uint64_t from = address / (most * BASE_PAGE) * (most * BASE_PAGE), first, past, low, limit;
	const uint8_t *states;

	if (!piece || piece->start > address)
		return 0;
	states = (const uint8_t *)piece->states;
	low = (higher(from, piece->start) - piece->start) / BASE_PAGE;
	limit = (lower(from + most * BASE_PAGE, piece->end) - piece->start) / BASE_PAGE;
	first = past = (address - piece->start) / BASE_PAGE;
	while (past < limit && states[past] == UFFD_OWED_YES)
		past++;
	if (past == first)
		return 0;
	while (first > low && states[first - 1] == UFFD_OWED_YES)
		first--;
	*piece_ret = piece;
	*address_ret = piece->start + first * BASE_PAGE;
	return past - first;
}

void uffd_owed_settle(struct uffd_owed *owed, struct uffd_owed_piece *piece, uint64_t address,
		      enum uffd_owed_state state)
{
	atomic_store(&piece->states[(address - piece->start) / BASE_PAGE], (uint8_t)state);
	owed->left--;
	owed->dropped += state == UFFD_OWED_DROPPED;
}

int uffd_owed_move(struct uffd_owed *owed, uint64_t from, uint64_t to, uint64_t length)
{
	return uffd_places_move(&owed->places, from, to, length);
}

int uffd_owed_remove(struct uffd_owed *owed, uint64_t start, uint64_t end)
{
	return uffd_places_remove(&owed->places, start, end);
}

int uffd_owed_ranges(const struct uffd_owed *owed, uint8_t state,
		     struct uffd_page_ranges *ranges_ret)
{
	int ret = 0;

	for (uint64_t i = 0; !ret && i < owed->parts_count; i++) {
		const struct uffd_owed_part *part = &owed->parts[i];
		const uint8_t *states = (const uint8_t *)part->states;
		uint64_t pages = (part->at.end - part->at.start) / BASE_PAGE, at = 0;

		while (!ret && at < pages) {
			const uint8_t *found = memchr(states + at, state, pages - at);
			uint64_t first;

			if (!found)
				break;
			first = (uint64_t)(found - states);
			for (at = first; at < pages && states[at] == state; at++)
				;
			ret = uffd_ranges_append(ranges_ret, part->at.start + first * BASE_PAGE,
						 part->at.start + at * BASE_PAGE);
		}
	}
	return ret;
}
