/* SPDX-License-Identifier: MIT */
/* Runs of pages that have one state. */
#ifndef UFFD_ENGINE_RUNS_H
#define UFFD_ENGINE_RUNS_H

#include <stdint.h>

/* Beside a page's state: it was written since the last checkpoint, whatever its state says. */
#define UFFD_PAGE_WRITTEN	0x80u

struct uffd_run {
	uint64_t start;
	uint64_t end;
	uint64_t state;		/* enum uffd_page_state */
};

/*
 * The runs of pages that are WRITTEN, or whose state is not among those of the mask `without`,
 * a bit for each; `offset` is that of the first page.  Returns how many there are, and stores
 * as many as fit.
 */
uint64_t uffd_runs_of(const uint8_t *states, uint64_t pages, uint64_t page_size,
		      uint64_t offset, uint32_t without, struct uffd_run *runs_ret,
		      uint64_t capacity);

#endif /* UFFD_ENGINE_RUNS_H */
