/* SPDX-License-Identifier: MIT */
/*
 * Places from which pieces were moved.
 *
 * mremap(2) with MREMAP_DONTUNMAP leaves the old addresses mapped, empty and registered.
 * Its event does not tell so, and no UNMAP follows (measured on Linux 6.18).  So each place
 * is noted until its UNMAP event comes, or until the kernel says that it is still
 * registered: see left.h.
 */
#ifndef UFFD_ENGINE_VACATED_H
#define UFFD_ENGINE_VACATED_H

#include "core.h"

/*
 * With the gate closed.  Out of memory: a failure is noted, and a fault there is a stray.
 */
void note_vacated(const struct uffd_range *range, uint64_t start, uint64_t end);
/* What was left behind in [from, +length) was moved as well; both places may be mapped. */
void move_vacated(struct uffd_space *space, uint64_t from, uint64_t to, uint64_t length);
void clone_vacated(struct uffd_space *parent, struct uffd_space *child);
/* [start, end) was unmapped, or is registered anew. */
void forget_vacated(struct uffd_space *space, uint64_t start, uint64_t end);

bool has_vacated(struct uffd_space *space);
bool is_vacated(struct uffd_space *space, uint64_t address);
/* With the gate closed: take a place off the list; it is then the caller's. */
void unlink_vacated(struct uffd_range *place);
void drop_vacated(struct uffd_space *space);

#endif /* UFFD_ENGINE_VACATED_H */
