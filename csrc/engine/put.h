/* SPDX-License-Identifier: MIT */
/* Put pages in place, or poison those without content.  Async-signal-safe. */
#ifndef UFFD_ENGINE_PUT_H
#define UFFD_ENGINE_PUT_H

#include "core.h"
#include "fill.h"

enum fill_for {
	FILL_MISSING,	/* a missing fault: the page itself */
	FILL_MINOR,	/* a minor fault: the page cache holds it */
	FILL_AHEAD,	/* no fault yet */
	FILL_CHECKED,	/* the same; the caller looks whether the source's file is long enough */
	FILL_MISSING_LATE,	/* as FILL_MISSING, but the caller wakes the waiters */
	FILL_MINOR_LATE,
};

/* `fault`: NULL: of this thread. */
static inline enum fill_for fill_for_fault(enum uffd_fault_kind kind,
					   const struct deferred_fault *fault)
{
	if (fault && fault->late)
		return kind == UFFD_KIND_MINOR ? FILL_MINOR_LATE : FILL_MISSING_LATE;
	return kind == UFFD_KIND_MINOR ? FILL_MINOR : FILL_MISSING;
}

int put_zeros(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
	      struct uffd_fill_result *result_ret);
int put_continue(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
		 struct uffd_fill_result *result_ret);
/*
 * Map a page that evict() is dropping, while the page cache has it (or -EFAULT).  It is dropped all
 * the same, but that waits for the lock of its file, which a thread in write(2) has while it waits
 * for this page.  -EAGAIN: later.
 */
int put_going(struct uffd_range *range, uint64_t page);
/* Fill pages [at, at + length) from memory of this process. */
int put_bytes(struct uffd_range *range, uint64_t at, uint64_t length, uint64_t source,
	      enum fill_for why, struct uffd_fill_result *result_ret);
/*
 * Fill absent pages that the caller has claimed; a run never crosses into the content's
 * tail.  Decides how, for all callers: write to the page cache if the range has
 * writes_cache; else map the page cache as it is for a minor fault, or if the mode lacks
 * MISSING; else copy or zero.
 */
int put_content(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
		struct uffd_fill_result *result_ret);
int poison_pages(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret);
/* Poison one page, even over a write-protect marker; returns its new state. */
uint8_t poison_one(struct uffd_range *range, uint64_t page, bool *put_off_ret);
void poison_page(struct uffd_range *range, uint64_t page);

/* Give claimed pages back in this state, and wake their waiters to fault again. */
void unclaim(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state);
/* Wake threads that faulted after the ioctl's wake but before the states were set. */
void wake_again(struct uffd_range *range, uint64_t at, uint64_t end);
/*
 * The same, but only if a fault met a page in flight since `before`, the engine's
 * `turned_away` before the pages were claimed; most often there was none.
 */
void wake_turned_away(struct uffd_range *range, uint64_t at, uint64_t end, uint64_t before);

#endif /* UFFD_ENGINE_PUT_H */
