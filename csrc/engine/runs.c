// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <stdbool.h>

#include "runs.h"

/*
 * Whether two states belong to one run although only one has the mark: the mark makes no
 * difference if the state is wanted anyway.
 */
static bool differs_in_mark(uint8_t one, uint8_t other, uint32_t without)
{
	return (one ^ other) == UFFD_PAGE_WRITTEN &&
	       !(without & 1u << (one & ~UFFD_PAGE_WRITTEN));
}

uint64_t uffd_runs_of(const uint8_t *states, uint64_t pages, uint64_t page_size,
		      uint64_t offset, uint32_t without, struct uffd_run *runs_ret,
		      uint64_t capacity)
{
	uint64_t found = 0;

	for (uint64_t page = 0, first; page < pages;) {
		uint8_t state = states[page];

		first = page;
		while (page < pages && (states[page] == state ||
					differs_in_mark(states[page], state, without)))
			page++;
		if (!(state & UFFD_PAGE_WRITTEN) && without & 1u << state)
			continue;
		if (found < capacity)
			runs_ret[found] = (struct uffd_run){ offset + first * page_size,
							     offset + page * page_size,
							     state & ~UFFD_PAGE_WRITTEN };
		found++;
	}
	return found;
}
