/* SPDX-License-Identifier: MIT */
/*
 * Filling ranges correctly: loops over partial results, wakes after EEXIST,
 * backs off on EAGAIN.  Async-signal-safe.
 */
#ifndef UFFD_FILL_H
#define UFFD_FILL_H

#include <stdint.h>

#include "uffd_shim.h"

enum uffd_fill_op {
	UFFD_FILL_COPY,
	UFFD_FILL_ZERO,
	UFFD_FILL_CONTINUE,
	UFFD_FILL_POISON,
	UFFD_FILL_MOVE,
};

struct uffd_fill {
	int fd;
	uint32_t op;		/* enum uffd_fill_op */
	uint64_t dst;
	uint64_t src;		/* COPY, MOVE; ZERO of a huge page: where zeros can be read */
	uint64_t length;
	uint64_t mode;
	uint64_t page_size;	/* EEXIST skips this much */
	uint64_t limit_ns;	/* how long EAGAIN without progress is retried; 0: not at all */
	uint32_t leaves_waiters; /* EEXIST wakes nobody; the caller does */
	uint32_t maps_cached;	/* EEXIST: map what the page cache holds; it may be mapped nowhere */
	uint32_t asks_cache;	/* a private mapping: COPY would cover what the page cache holds */
	uint64_t cached_mode;	/* of CONTINUE for either */
};

struct uffd_fill_result {
	uint64_t done;
	uint64_t already_present;
	uint64_t deferred;	/* left undone because the layout kept changing */
	uint32_t has_no_cache;	/* `asks_cache` of anonymous memory */
};

/*
 * Fill a range.  Returns 0 when everything is done, present or deferred; else
 * -errno of the page at dst + done + already_present, with the counts up to it.
 */
int uffd_fill_run(const struct uffd_fill *fill, struct uffd_fill_result *result_ret);

/*
 * Fault memory of this process in, as far as it can be: what that waits for is not
 * waited for later, where others would wait for us.
 */
void uffd_fault_in(uint64_t address, uint64_t length, uint32_t for_writing);

#endif /* UFFD_FILL_H */
