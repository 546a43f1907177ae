/* SPDX-License-Identifier: MIT */
/*
 * Unmappings whose events are still to come.
 *
 * Threads change the layout concurrently, and their events arrive in the order in which
 * they were sent, not in which the changes were made.  A REMAP takes the old addresses
 * out of the table, so the UNMAP that follows must not: another range may be there by
 * then.  Likewise a piece that a REMAP finds at its new addresses is unmapped already,
 * and its UNMAP is still to come.  Both are noted as expected.
 */
#ifndef UFFD_ENGINE_EXPECTED_H
#define UFFD_ENGINE_EXPECTED_H

#include "core.h"

/* An UNMAP of [start, end) is still to come.  Out of memory: a failure is noted. */
void expect_unmap(struct uffd_space *space, uint64_t start, uint64_t end);
/*
 * Remove the part in [start, end) of one that overlaps that; false: none does.  `from_ret`,
 * `to_ret`: that part.
 */
bool take_expected(struct uffd_space *space, uint64_t start, uint64_t end, uint64_t *from_ret,
		   uint64_t *to_ret);
void drop_expected(struct uffd_space *space);

#endif /* UFFD_ENGINE_EXPECTED_H */
