/* SPDX-License-Identifier: MIT */
/*
 * Which pages of another process are still to be saved, and where they are by now.
 *
 * A part is memory as it was at the instant, with one byte of state for each page.  A piece is a
 * part, or a portion of one, at its present address.
 */
#ifndef UFFD_SNAPSHOT_OWED_H
#define UFFD_SNAPSHOT_OWED_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "snapshot/image.h"
#include "snapshot/places.h"

enum uffd_owed_state {
	UFFD_OWED_NOT,		/* it has no content that must be saved */
	UFFD_OWED_YES,
	UFFD_OWED_TAKEN,	/* on its way to the file */
	UFFD_OWED_DATA,		/* in the file */
	UFFD_OWED_ZERO,		/* all zeros, not in the file */
	UFFD_OWED_DROPPED,	/* given back before it was saved */
	UFFD_OWED_UNREADABLE,
};

struct uffd_owed_part {
	struct uffd_image_piece at;
	_Atomic uint8_t *states;
};

struct uffd_owed {
	/* Those of all parts, one behind the other. */
	_Atomic uint8_t *states;
	uint64_t states_length;
	struct uffd_owed_part *parts;
	uint64_t parts_count;
	struct uffd_places places;
	/* Pages in UFFD_OWED_YES. */
	uint64_t left;
	uint64_t dropped;
};

int uffd_owed_init(struct uffd_owed *owed, const struct uffd_image_piece *parts,
		   uint64_t parts_count, const struct uffd_page_region *pages, uint64_t count);
/* Whether it was made for these parts. */
bool uffd_owed_is_of(const struct uffd_owed *owed, const struct uffd_image_piece *parts,
		     uint64_t count);
/* Owe these pages of its parts instead of those in `before`. */
int uffd_owed_change(struct uffd_owed *owed, const struct uffd_page_ranges *before,
		     const struct uffd_page_region *pages, uint64_t count);
void uffd_owed_deinit(struct uffd_owed *owed);

/* The next owed pages from an address on, at most `most` in one piece; 0: none. */
uint64_t uffd_owed_next(struct uffd_owed *owed, uint64_t address, uint64_t end, uint64_t most,
			struct uffd_owed_piece **piece_ret, uint64_t *address_ret);
/* The owed pages around an owed one, in an aligned window of `most` pages; 0: it is not owed. */
uint64_t uffd_owed_around(struct uffd_owed *owed, uint64_t address, uint64_t most,
			  struct uffd_owed_piece **piece_ret, uint64_t *address_ret);
/* One page is no longer owed. */
void uffd_owed_settle(struct uffd_owed *owed, struct uffd_owed_piece *piece, uint64_t address,
		      enum uffd_owed_state state);
/* Memory has moved. */
int uffd_owed_move(struct uffd_owed *owed, uint64_t from, uint64_t to, uint64_t length);
/* Memory is gone: nothing of it is owed any more. */
int uffd_owed_remove(struct uffd_owed *owed, uint64_t start, uint64_t end);
/* Append all pages in one state, by their address at the instant. */
int uffd_owed_ranges(const struct uffd_owed *owed, uint8_t state,
		     struct uffd_page_ranges *ranges_ret);

#endif /* UFFD_SNAPSHOT_OWED_H */
