/* SPDX-License-Identifier: MIT */
/*
 * What the owner's page table says: states of ours are what we did, and others may have
 * filled pages, or taken protection off, beside us.  Async-signal-safe, but for opening.
 */
#ifndef UFFD_ENGINE_PAGE_TABLE_H
#define UFFD_ENGINE_PAGE_TABLE_H

#include "core.h"

/* Entries of `pages` pages of a range; false where they cannot be read. */
bool read_entries(const struct uffd_range *range, uint64_t at, uint64_t pages,
		  uint64_t *entries_ret);
/* How much of a run, from its first page on, is mapped nowhere in the owner for sure. */
uint64_t unmapped_run(const struct uffd_range *range, uint64_t at, uint64_t length);
int open_page_table(int pid);
/* A state of ours, corrected by what the page table says. */
uint8_t seen_state(const struct uffd_range *range, uint8_t state, uint64_t entry);

#endif /* UFFD_ENGINE_PAGE_TABLE_H */
