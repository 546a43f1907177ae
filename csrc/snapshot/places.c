// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "base/page.h"
#include "snapshot/places.h"

/* A change cuts at two addresses in one place and at two in the other. */
#define CUTS_MOST 4u

static struct uffd_owed_piece *at(const struct uffd_places *places, uint32_t index)
{
	return &places->vec[index];
}

static uint32_t random_weight(struct uffd_places *places)
{
	/* xorshift32 (Marsaglia, "Xorshift RNGs") */
	places->seed ^= places->seed << 13;
	places->seed ^= places->seed >> 17;
	places->seed ^= places->seed << 5;
	return places->seed;
}

int uffd_places_init(struct uffd_places *places, uint64_t capacity)
{
	*places = (struct uffd_places){ .used = 1, .seed = 2463534242u };
	if (capacity >= UINT32_MAX / 2)
		return -ENOMEM;
	places->capacity = (uint32_t)capacity + 1;
	places->vec = calloc(places->capacity, sizeof(*places->vec));
	return places->vec ? 0 : -ENOMEM;
}

void uffd_places_deinit(struct uffd_places *places)
{
	free(places->vec);
	*places = (struct uffd_places){ 0 };
}

/* Have room for the cuts of one change; invalidates pointers to pieces. */
static int reserve(struct uffd_places *places)
{
	struct uffd_owed_piece *more;
	uint32_t capacity;

	if (places->used + CUTS_MOST <= places->capacity)
		return 0;
	if (places->capacity >= UINT32_MAX / 2 - CUTS_MOST)
		return -ENOMEM;
	capacity = 2 * places->capacity + CUTS_MOST;
	more = realloc(places->vec, capacity * sizeof(*more));
	if (!more)
		return -ENOMEM;
	places->vec = more;
	places->capacity = capacity;
	return 0;
}

static uint32_t new_piece(struct uffd_places *places, struct uffd_owed_piece piece)
{
	uint32_t index = places->unused;

	if (index)
		places->unused = at(places, index)->left;
	else
		index = places->used++;
	piece.left = piece.right = 0;
	piece.weight = random_weight(places);
	*at(places, index) = piece;
	return index;
}

static void free_piece(struct uffd_places *places, uint32_t index)
{
	at(places, index)->left = places->unused;
	places->unused = index;
}

static void free_tree(struct uffd_places *places, uint32_t tree)
{
	if (!tree)
		return;
	free_tree(places, at(places, tree)->left);
	free_tree(places, at(places, tree)->right);
	free_piece(places, tree);
}

/* What begins below an address, and the rest. */
static void split(struct uffd_places *places, uint32_t tree, uint64_t address, uint32_t *low_ret,
		  uint32_t *high_ret)
{
	while (tree) {
		struct uffd_owed_piece *piece = at(places, tree);

		if (piece->start < address) {
			*low_ret = tree;
			low_ret = &piece->right;
			tree = piece->right;
		} else {
			*high_ret = tree;
			high_ret = &piece->left;
			tree = piece->left;
		}
	}
	*low_ret = *high_ret = 0;
}

/* All of `low` is below all of `high`. */
static uint32_t merge(struct uffd_places *places, uint32_t low, uint32_t high)
{
	uint32_t tree = 0, *place = &tree;

	while (low && high) {
		if (at(places, low)->weight > at(places, high)->weight) {
			*place = low;
			place = &at(places, low)->right;
			low = *place;
		} else {
			*place = high;
			place = &at(places, high)->left;
			high = *place;
		}
	}
	*place = low ? low : high;
	return tree;
}

void uffd_places_add(struct uffd_places *places, struct uffd_owed_piece piece)
{
	uint32_t index = new_piece(places, piece), *place = &places->root;

	/* The last piece is the rightmost, and the heaviest are at the top. */
	while (*place && at(places, *place)->weight > at(places, index)->weight)
		place = &at(places, *place)->right;
	at(places, index)->left = *place;
	*place = index;
}

/* The first that ends behind an address; 0: none. */
static uint32_t index_from(const struct uffd_places *places, uint64_t address)
{
	uint32_t tree = places->root, found = 0;

	while (tree) {
		const struct uffd_owed_piece *piece = at(places, tree);

		if (piece->end > address)
			found = tree;
		tree = piece->end > address ? piece->left : piece->right;
	}
	return found;
}

struct uffd_owed_piece *uffd_places_from(const struct uffd_places *places, uint64_t address)
{
	uint32_t index = index_from(places, address);

	return index ? at(places, index) : NULL;
}

static void insert(struct uffd_places *places, uint32_t tree, uint64_t start)
{
	uint32_t low, high;

	split(places, places->root, start, &low, &high);
	places->root = merge(places, merge(places, low, tree), high);
}

/* Have a piece begin at an address, if one crosses it. */
static void cut(struct uffd_places *places, uint64_t address)
{
	struct uffd_owed_piece *piece = uffd_places_from(places, address), second;

	if (!piece || piece->start >= address)
		return;
	second = *piece;
	second.start = address;
	second.offset += address - piece->start;
	second.states += (address - piece->start) / BASE_PAGE;
	piece->end = address;
	insert(places, new_piece(places, second), address);
}

/* Take everything in a range out of the tree. */
static uint32_t take_out(struct uffd_places *places, uint64_t start, uint64_t end)
{
	uint32_t low, high, taken;

	cut(places, start);
	cut(places, end);
	split(places, places->root, start, &low, &high);
	split(places, high, end, &taken, &high);
	places->root = merge(places, low, high);
	return taken;
}

static void shift(struct uffd_places *places, uint32_t tree, uint64_t by)
{
	if (!tree)
		return;
	at(places, tree)->start += by;
	at(places, tree)->end += by;
	shift(places, at(places, tree)->left, by);
	shift(places, at(places, tree)->right, by);
}

/* Have one piece instead of two that meet at an address and belong together. */
static void join(struct uffd_places *places, uint64_t address)
{
	struct uffd_owed_piece *first = uffd_places_from(places, address - 1);
	struct uffd_owed_piece *second = uffd_places_from(places, address);
	uint32_t low, high, joined;
	uint64_t length;

	if (!first || !second || first->end != address || second->start != address)
		return;
	length = first->end - first->start;
	if (second->offset != first->offset + length ||
	    second->states != first->states + length / BASE_PAGE)
		return;
	first->end = second->end;
	split(places, places->root, address, &low, &high);
	split(places, high, address + 1, &joined, &high);
	free_tree(places, joined);
	places->root = merge(places, low, high);
}

int uffd_places_move(struct uffd_places *places, uint64_t from, uint64_t to, uint64_t length)
{
	int ret = reserve(places);
	uint32_t moved;

	if (ret)
		return ret;
	moved = take_out(places, from, from + length);
	free_tree(places, take_out(places, to, to + length));
	shift(places, moved, to - from);
	insert(places, moved, to);
	join(places, to);
	join(places, to + length);
	return 0;
}

int uffd_places_remove(struct uffd_places *places, uint64_t start, uint64_t end)
{
	int ret = reserve(places);

	if (!ret)
		free_tree(places, take_out(places, start, end));
	return ret;
}
