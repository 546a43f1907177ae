/* SPDX-License-Identifier: MIT */
/*
 * Where memory is by now that was somewhere else at the instant: pieces in the order of their
 * addresses.  Moving or removing some costs as much as they are many, however many others there
 * are.  Two that are adjacent again, in memory and in the file, are one again.
 */
#ifndef UFFD_SNAPSHOT_PLACES_H
#define UFFD_SNAPSHOT_PLACES_H

#include <stdatomic.h>
#include <stdint.h>

struct uffd_owed_piece {
	uint64_t start;
	uint64_t end;
	uint64_t offset; /* in the file */
	_Atomic uint8_t *states;
	/* A treap: ordered by address, and a heap by weight.  Indices; 0: none. */
	uint32_t left, right;
	uint32_t weight;
};

struct uffd_places {
	struct uffd_owed_piece *vec;
	uint32_t capacity;
	uint32_t used; /* of vec, from 1 on */
	uint32_t unused; /* the first that is unused again; the next one is its `left` */
	uint32_t root;
	uint32_t seed;
};

int uffd_places_init(struct uffd_places *places, uint64_t capacity);
void uffd_places_deinit(struct uffd_places *places);
/* Add a piece behind all others, at most `capacity`, before anything else is done. */
void uffd_places_add(struct uffd_places *places, struct uffd_owed_piece piece);
/* The first piece that ends behind an address, or NULL; it is valid until the next change. */
struct uffd_owed_piece *uffd_places_from(const struct uffd_places *places, uint64_t address);
/* Memory has moved: pieces in its new place are removed.  After -ENOMEM nothing has changed. */
int uffd_places_move(struct uffd_places *places, uint64_t from, uint64_t to, uint64_t length);
/* After -ENOMEM nothing has changed. */
int uffd_places_remove(struct uffd_places *places, uint64_t start, uint64_t end);

#endif /* UFFD_SNAPSHOT_PLACES_H */
