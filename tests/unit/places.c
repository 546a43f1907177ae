// SPDX-License-Identifier: MIT
/*
 * Moves and removes pieces at random, and compares them with one number for each page: places SEED.
 * Prints how many pieces there was room for in the end.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/page.h"
#include "snapshot/places.h"

#define PAGES 512u
#define PARTS 16u
#define STEPS 4000u

static uint64_t model[PAGES]; /* page of the file, from 1 on; 0: nothing is there */
static _Atomic uint8_t states[PAGES + 2 * PARTS];

static void add(struct uffd_places *places, uint64_t first, uint64_t past, uint64_t page)
{
	uffd_places_add(places, (struct uffd_owed_piece){ .start = first * BASE_PAGE,
							  .end = past * BASE_PAGE,
							  .offset = page * BASE_PAGE,
							  .states = states + page });
	for (uint64_t i = first; i < past; i++)
		model[i] = page + (i - first) + 1;
}

static void check(const struct uffd_places *places, unsigned int step)
{
	for (uint64_t i = 0; i < PAGES; i++) {
		const struct uffd_owed_piece *piece = uffd_places_from(places, i * BASE_PAGE);
		uint64_t found = 0;

		if (piece && piece->start <= i * BASE_PAGE) {
			found = (piece->offset + i * BASE_PAGE - piece->start) / BASE_PAGE + 1;
			if (piece->states - states != (ptrdiff_t)(piece->offset / BASE_PAGE))
				found = UINT64_MAX;
			/* It is as long as it can be. */
			if (piece->end < PAGES * BASE_PAGE &&
			    model[piece->end / BASE_PAGE] ==
				    piece->offset / BASE_PAGE +
					    (piece->end - piece->start) / BASE_PAGE + 1)
				found = UINT64_MAX - 1;
		}
		if (found != model[i]) {
			printf("step %u, page %" PRIu64 ": %" PRIx64 " is not %" PRIx64 "\n", step,
			       i, found, model[i]);
			exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	struct uffd_places places;
	uint64_t was[PAGES];

	if (argc != 2 || uffd_places_init(&places, PARTS))
		return 2;
	srandom((unsigned int)atoi(argv[1]));
	for (uint64_t i = 0; i < PARTS; i++) /* some are adjacent in the file, none twice there */
		add(&places, i * (PAGES / PARTS), (i + 1) * (PAGES / PARTS) - i % 3,
		    i * (PAGES / PARTS) + i);
	for (unsigned int step = 0; step < STEPS; step++) {
		uint64_t length = 1 + (uint64_t)random() % 24;
		uint64_t from = (uint64_t)random() % (PAGES - length);
		uint64_t to = (uint64_t)random() % (PAGES - length);

		check(&places, step);
		if (random() % 64 == 0) {
			if (uffd_places_remove(&places, from * BASE_PAGE,
					       (from + length) * BASE_PAGE))
				return 2;
			for (uint64_t i = 0; i < length; i++)
				model[from + i] = 0;
		} else if (from + length <= to || to + length <= from) {
			if (uffd_places_move(&places, from * BASE_PAGE, to * BASE_PAGE,
					     length * BASE_PAGE))
				return 2;
			for (uint64_t i = 0; i < length; i++) {
				was[i] = model[from + i];
				model[from + i] = 0;
			}
			for (uint64_t i = 0; i < length; i++)
				model[to + i] = was[i];
		}
	}
	printf("%u pieces\n", places.capacity);
	uffd_places_deinit(&places);
	return 0;
}
