/* SPDX-License-Identifier: MIT */
/*
 * Mappings that have grown: mremap(2) extends a registered mapping together with its
 * registration, and sends no event (measured on Linux 6.18).
 */
#ifndef UFFD_ENGINE_GROWN_H
#define UFFD_ENGINE_GROWN_H

#include "core.h"

/*
 * Fill a page that a mapping has grown by with zeros, or map the page cache's page.
 * OUTCOME_STRAY: it is no such page.  For readers of the table; async-signal-safe.
 */
enum outcome resolve_grown(struct uffd_table *table, uint64_t address, enum uffd_fault_kind kind);
/* Unregister what a piece has grown by; call before the piece is unregistered and removed. */
void unregister_grown(struct uffd_range *range);

#endif /* UFFD_ENGINE_GROWN_H */
