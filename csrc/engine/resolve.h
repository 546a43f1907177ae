/* SPDX-License-Identifier: MIT */
/* What to do about a page.  Async-signal-safe, apart from asking a worker for content. */
#ifndef UFFD_ENGINE_RESOLVE_H
#define UFFD_ENGINE_RESOLVE_H

#include "core.h"
#include "fill.h"

/* `fault`: what a message said of it; NULL: the thread that waits is this one. */
enum outcome resolve_page(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			  const struct deferred_fault *fault);
/* `thread_id`: of the thread that waits; 0 where the kernel does not say. */
enum outcome apply_on_error(struct uffd_range *range, uint64_t page, int error,
			    enum uffd_failure_stage stage, uint32_t thread_id);
/* A fill has put pages in [at, past), or found them there. */
void set_filled(struct uffd_range *range, uint64_t at, uint64_t past,
		const struct uffd_fill_result *result);
/* A fill says that the huge page is there, on so many occasions that it cannot be. */
bool lacks_huge_page(struct uffd_range *range, uint64_t page, uint64_t occasion);
#define EXISTS_LIMIT		8
/* For the leader, whom a source may hold up: OUTCOME_DISMISSED if it did for too long. */
enum outcome resolve_as_leader(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			       const struct deferred_fault *fault);

/*
 * A run of pages that were filled.  Whoever waited in [from, past) was woken, by the
 * ioctl or because the page was there; `past` is where to go on.
 */
struct fill_run {
	uint64_t from, past;
	uint64_t filled;	/* bytes */
	int error;		/* of the page at `past` */
};

/* Fill the first run of absent pages in [at, end); an empty one at `end`: none is left. */
struct fill_run fill_absent(struct uffd_range *range, uint64_t at, uint64_t end);
/* What to fill besides `page`: its chunk, more of them when faults come in sequence. */
void prefetch_span(struct uffd_range *range, uint64_t page, uint64_t *from_ret,
		   uint64_t *to_ret);

#endif /* UFFD_ENGINE_RESOLVE_H */
