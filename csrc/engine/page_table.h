/* SPDX-License-Identifier: MIT */
/*
 * Look into the owner's page table.  Our states record what we did; others may have filled
 * pages or removed their protection.  Async-signal-safe, except open_page_table().
 */
#ifndef UFFD_ENGINE_PAGE_TABLE_H
#define UFFD_ENGINE_PAGE_TABLE_H

#include "core.h"

/* Read the entries of `pages` pages of a range; false if they cannot be read. */
bool read_entries(const struct uffd_range *range, uint64_t at, uint64_t pages,
		  uint64_t *entries_ret);
/* How much of a run, from its start, has no page mapped; all if the table is unreadable. */
uint64_t unmapped_run(const struct uffd_range *range, uint64_t at, uint64_t length);
int open_page_table(int pid);
/* Correct a state of ours by what the page table says. */
uint8_t seen_state(const struct uffd_range *range, uint8_t state, uint64_t entry);

/* Whether an entry is that of a page, which may be on swap, and not of a marker. */
bool has_page(const struct uffd_range *range, uint64_t entry);

/* Whether a page of this state, whose writer waits at its protection, may be there. */
bool may_be_written(const struct uffd_range *range, uint64_t page, uint8_t was);
/*
 * Find the first page of [at, end) that is present, on swap, or has a marker; false if there is
 * none, or if the page table cannot be read.
 */
bool next_present(int pagemap_fd, uint64_t at, uint64_t end, uint64_t *at_ret);
/* Note the pages of a range that are present already. */
void note_present(struct uffd_range *range);
/*
 * Whether all of a range of this process's memory is mapped, so that reading it does not fault;
 * false if the space cannot tell.
 */
bool is_mapped_here(const struct uffd_space *space, uint64_t address, uint64_t length);

#endif /* UFFD_ENGINE_PAGE_TABLE_H */
