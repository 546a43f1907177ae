/* SPDX-License-Identifier: MIT */
/*
 * Unmappings whose events are still to come.
 *
 * Threads change the layout at the same time, and their events come in the order in
 * which they were sent, not in which the changes were made.  A REMAP has taken the
 * old place out, so the UNMAP that follows it must not: somebody else may live
 * there by then.  Likewise what a REMAP finds at its new place is dead already,
 * and the UNMAP that says so is still to come.  Both are noted as expected.
 */
#ifndef UFFD_ENGINE_EXPECTED_H
#define UFFD_ENGINE_EXPECTED_H

#include "core.h"

/* An UNMAP of [start, end) is still to come. */
void expect_unmap(struct uffd_space *space, uint64_t start, uint64_t end);
/* Take one that reaches into [start, end) off the list, less what lies outside; NULL: none. */
struct expected_unmap *take_expected(struct uffd_space *space, uint64_t start, uint64_t end);
/* What is put in [start, end) now was mapped after every unmapping that is expected there. */
void drop_expected(struct uffd_space *space, uint64_t start, uint64_t end);

#endif /* UFFD_ENGINE_EXPECTED_H */
