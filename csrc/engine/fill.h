/* SPDX-License-Identifier: MIT */
/*
 * Fill ranges: loop over partial results, wake after EEXIST, back off on EAGAIN.
 * Async-signal-safe.
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
	uint64_t src;		/* COPY, MOVE */
	uint64_t length;
	uint64_t mode;
	uint64_t page_size;	/* EEXIST skips this much */
	uint64_t limit_ns;	/* how long to retry EAGAIN without progress; 0: not at all */
	uint32_t leaves_waiters; /* after EEXIST do not wake; the caller does */
	uint32_t maps_cached;	/* after EEXIST map the page cache's page: it may be unmapped */
	uint32_t asks_cache;	/* private mapping: COPY would hide the page cache's page */
	uint64_t cached_mode;	/* mode of CONTINUE for either */
};

struct uffd_fill_result {
	uint64_t done;
	uint64_t already_present;
	uint64_t deferred;	/* left undone because the layout kept changing */
	uint32_t has_no_cache;	/* `asks_cache` was set for anonymous memory */
};

/*
 * Fill a range.  Returns 0 if every page is done, present or deferred; else the
 * -errno of the page at dst + done + already_present, with the counts up to it.
 */
int uffd_fill_run(const struct uffd_fill *fill, struct uffd_fill_result *result_ret);

/*
 * Fault memory of this process in, as far as possible, so that a later access does not
 * block while others wait for us.
 */
void uffd_fault_in(uint64_t address, uint64_t length, uint32_t for_writing);

#endif /* UFFD_FILL_H */
