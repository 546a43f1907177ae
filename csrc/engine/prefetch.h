/* SPDX-License-Identifier: MIT */
/* Fill ahead of the faults, in the leader's spare time. */
#ifndef UFFD_ENGINE_PREFETCH_H
#define UFFD_ENGINE_PREFETCH_H

#include "core.h"

/* Work on the newest job; false: there is none, or the leader was dismissed. */
bool run_prefetch_slice(struct uffd_engine *engine);
/* A page was resolved: plan to fill around it. */
void plan_prefetch(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind);
/* Whether the newest job comes to this page next: a sequential reader. */
bool is_next_in_line(const struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind);
enum outcome fill_in_line(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			  const struct deferred_fault *fault);
void forget_jobs(struct uffd_engine *engine, const struct uffd_space *space);

#endif /* UFFD_ENGINE_PREFETCH_H */
