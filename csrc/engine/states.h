/* SPDX-License-Identifier: MIT */
/* What is known of pages: told, and told while they are protected anew. */
#ifndef UFFD_ENGINE_STATES_H
#define UFFD_ENGINE_STATES_H

#include "core.h"

int uffd_engine_states(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		       uint64_t first_page, uint64_t pages, uint8_t *states_ret);

/*
 * Write-protect pages, and tell the state of each at the instant when it was protected:
 * a write comes before that and shows in the state, or after it and makes the page dirty
 * anew.  On an error what was protected by then is called dirty again.
 */
int uffd_engine_writeprotect(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			     uint64_t offset, uint64_t length, uint8_t *states_ret);

/* Note the pages that are there already, as far as the owner's page table tells. */
int uffd_engine_take_in(struct uffd_engine *engine, const struct uffd_range_ref *ref);

#endif /* UFFD_ENGINE_STATES_H */
