/* SPDX-License-Identifier: MIT */
/* The ioctls that put pages in place, and mark those that have no content.  Async-signal-safe. */
#ifndef UFFD_ENGINE_PUT_H
#define UFFD_ENGINE_PUT_H

#include "core.h"
#include "fill.h"

enum fill_for {
	FILL_MISSING,	/* a missing fault: the page itself */
	FILL_MINOR,	/* a minor fault: the page cache holds it */
	FILL_AHEAD,	/* whoever may fault later */
};

int put_zeros(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
	      struct uffd_fill_result *result_ret);
int put_continue(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret);
/* Pages [at, at + length) from memory of this process. */
int put_bytes(struct uffd_range *range, uint64_t at, uint64_t length, uint64_t source,
	      enum fill_for why, struct uffd_fill_result *result_ret);
/*
 * Absent pages, claimed by the caller; a run never crosses into the content's tail.  How
 * they get their content is decided here, whoever asks: through the page cache where the
 * range says so, else by a copy, where the mode has MISSING, else (and for a minor fault) from
 * the page cache as it is.
 */
int put_content(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
		struct uffd_fill_result *result_ret);
int poison_pages(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret);
/* One page, for good; returns its state now. */
uint8_t poison_one(struct uffd_range *range, uint64_t page, bool *put_off_ret);
void poison_page(struct uffd_range *range, uint64_t page);

/* Give claimed pages back in this state, and let those who waited for us ask again. */
void unclaim(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state);
void wake_again(struct uffd_range *range, uint64_t at, uint64_t end);

#endif /* UFFD_ENGINE_PUT_H */
