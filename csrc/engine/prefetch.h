/* SPDX-License-Identifier: MIT */
/* Filling ahead of the faults, in the spare time of the leader. */
#ifndef UFFD_ENGINE_PREFETCH_H
#define UFFD_ENGINE_PREFETCH_H

#include "core.h"

/* Whether a slice was filled; false as well if the leader was dismissed meanwhile. */
bool run_prefetch_slice(struct uffd_engine *engine);
/* A page was resolved: fill around it, later. */
void plan_prefetch(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind);
/* Whether the newest job comes to this page next, for a reader in sequence. */
bool is_next_in_line(const struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind);
enum outcome fill_in_line(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind,
			  const struct deferred_fault *fault);
void forget_jobs(struct uffd_engine *engine, const struct uffd_space *space);

#endif /* UFFD_ENGINE_PREFETCH_H */
