/* SPDX-License-Identifier: MIT */
/*
 * Mappings that have grown: mremap(2) makes a registered mapping longer, registration
 * included, and sends no event (measured on Linux 6.18).
 */
#ifndef UFFD_ENGINE_GROWN_H
#define UFFD_ENGINE_GROWN_H

#include "core.h"

/*
 * Zeros for a page that a mapping has grown by, or what the page cache holds there.
 * OUTCOME_STRAY: it is none.  For readers of the table; async-signal-safe.
 */
enum outcome resolve_grown(struct uffd_table *table, uint64_t address, enum uffd_fault_kind kind);
/* What a piece has grown by goes with it; before that is unregistered, and taken out. */
void unregister_grown(struct uffd_range *range);

#endif /* UFFD_ENGINE_GROWN_H */
