/* SPDX-License-Identifier: MIT */
/* Make pieces of a range ready to be taken out. */
#ifndef UFFD_ENGINE_SEAL_H
#define UFFD_ENGINE_SEAL_H

#include "patience.h"

/* What is to be taken out of one piece, and what must be done about it first. */
struct piece {
	struct uffd_range_ref ref;	/* `start` as if the whole range had moved with it */
	uint64_t offset, end, page_size, mode;
	bool loses_content, can_poison, asks, preserves;
};

/*
 * Save what is to be preserved, lift the protection, and poison absent pages.  Returns an
 * error if absent pages would become zeros.
 */
int seal_piece(struct uffd_engine *engine, const struct piece *piece, struct patience *patience);
/* The memory goes away: only threads that wait already must not read zeros. */
int seal_in_flight(struct uffd_engine *engine, const struct piece *piece,
		   struct patience *patience);

#endif /* UFFD_ENGINE_SEAL_H */
