/* SPDX-License-Identifier: MIT */
/* Resolve a page's fault.  Async-signal-safe, except for queueing a request. */
#ifndef UFFD_ENGINE_RESOLVE_H
#define UFFD_ENGINE_RESOLVE_H

#include "core.h"
#include "put.h"

/* `fault`: from its message; NULL: the faulting thread is this one. */
enum outcome resolve_page(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			  const struct deferred_fault *fault);
/* `thread_id`: of the faulting thread; 0: the kernel does not say. */
enum outcome apply_on_error(struct uffd_range *range, uint64_t page, int error,
			    enum uffd_failure_stage stage, uint32_t thread_id);
/* Set the states of [at, past), which a fill has put in place or found present. */
void set_filled(struct uffd_range *range, uint64_t at, uint64_t past,
		const struct uffd_fill_result *result);
/* Whether a huge page is missing that a fill has just found "present". */
bool is_lacking(const struct uffd_range *range, uint64_t page);
/* Whether a huge page is missing although fills fail with EEXIST, by how often they did. */
bool lacks_huge_page(struct uffd_range *range, uint64_t page, uint64_t occasion);
#define EXISTS_LIMIT		8
/* For the leader, which a source may block: OUTCOME_DISMISSED if that took too long. */
enum outcome resolve_as_leader(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			       const struct deferred_fault *fault);

/*
 * A run of filled pages.  Waiters in [from, past) were woken, by the ioctl or because
 * the page was present; continue at `past`.
 */
struct fill_run {
	uint64_t from, past;
	uint64_t filled;	/* bytes */
	int error;		/* of the page at `past` */
};

/* Fill the first run of absent pages in [at, end); an empty run at `end`: none is left. */
struct fill_run fill_absent(struct uffd_range *range, uint64_t at, uint64_t end, enum fill_for why);
/* What to fill besides `page`: its chunk, or more chunks if faults are sequential. */
void prefetch_span(struct uffd_range *range, uint64_t page, uint64_t *from_ret,
		   uint64_t *to_ret);

#endif /* UFFD_ENGINE_RESOLVE_H */
