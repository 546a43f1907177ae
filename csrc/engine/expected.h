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

/* An UNMAP of [start, end) is still to come. */
void expect_unmap(struct uffd_space *space, uint64_t start, uint64_t end);
/* Remove one that overlaps [start, end), keeping its parts outside; NULL: none. */
struct expected_unmap *take_expected(struct uffd_space *space, uint64_t start, uint64_t end);
/* For a range added at [start, end): it was mapped after every unmapping expected there. */
void drop_expected(struct uffd_space *space, uint64_t start, uint64_t end);

#endif /* UFFD_ENGINE_EXPECTED_H */
