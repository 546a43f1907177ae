/* SPDX-License-Identifier: MIT */
/* A few pages of another process: their content, and whether it is what it was. */
#ifndef UFFD_SNAPSHOT_PAGES_H
#define UFFD_SNAPSHOT_PAGES_H

#include <stdint.h>

#include "uffd_pagemap.h"

#define UFFD_PAGES_MOST 128u

/* How many of at most UFFD_PAGES_MOST pages are still write-protected, and so unchanged. */
int uffd_pages_protected(int pagemap_fd, uint64_t start, uint64_t pages, uint64_t *pages_ret);
/* Read all, or -EFAULT; `mem_fd`: /proc/PID/mem, for memory without PROT_READ, or negative. */
int uffd_pages_read(int32_t pid, int mem_fd, uint64_t start, uint64_t pages, void *memory);
/* Append a range, in any order; `kind` is put into its categories. */
int uffd_pages_note(struct uffd_page_ranges *noted, uint64_t start, uint64_t end, uint64_t kind);

/* Append the noted ranges of at least a kind, as a set; the noted ones are sorted. */
int uffd_pages_as_set(struct uffd_page_ranges *noted, uint64_t kind,
		      struct uffd_page_ranges *ranges_ret);

#endif /* UFFD_SNAPSHOT_PAGES_H */
