/* SPDX-License-Identifier: MIT */
/* Where the content of memory is in the files of an incremental snapshot and its parents. */
#ifndef UFFD_SNAPSHOT_CHAIN_H
#define UFFD_SNAPSHOT_CHAIN_H

#include <stdint.h>

#include "uffd_pagemap.h"

/* States of pages in the file `runs`; docs/snapshots.md describes its rows. */
enum uffd_chain_state {
	UFFD_CHAIN_UNMAPPED,	/* no row has them */
	UFFD_CHAIN_DATA,
	UFFD_CHAIN_ZERO,
	UFFD_CHAIN_PARENT,
	UFFD_CHAIN_LAST = 6,
};

/* The rows of one snapshot, checked; each has six words. */
struct uffd_chain_table {
	const uint64_t *rows;
	uint64_t count;
};

struct uffd_chain {
	/* Rows (offset from `start`, leaf, offset in the leaf), joined where they go on. Leaf 0
	 * is zeros, leaf n + 1 is the file `pages` of table n. */
	struct uffd_page_ranges runs;
	/* Rows (first address, end, state) of what is neither DATA nor ZERO. */
	struct uffd_page_ranges others;
	/* Rows (first address, end, bytes of data in it) that cover all data. */
	struct uffd_page_ranges pieces;
	uint64_t data_bytes;
	uint32_t is_packed;	/* some of it is compressed: its offsets mean nothing */
};

/*
 * Resolve [start, end) through `depth` tables, the newest first.  A piece has at most `piece`
 * bytes of data, and no hole of that size.  -EINVAL: a row refers to a parent that is not there.
 * What was found is freed by uffd_chain_free(), also on failure.
 */
int uffd_chain_resolve(const struct uffd_chain_table *tables, uint64_t depth, uint64_t start,
		       uint64_t end, uint64_t piece, struct uffd_chain *ret);
void uffd_chain_free(struct uffd_chain *chain);

/*
 * The first of `count` rows of a file that is out of order, no range of whole pages, or whose content
 * is longer than a chunk or outside of a file `pages` of this length; `count` if there is none.
 */
uint64_t uffd_chain_first_bad(const uint64_t *rows, uint64_t count, uint64_t pages_length,
			      uint64_t chunk);

#endif /* UFFD_SNAPSHOT_CHAIN_H */
