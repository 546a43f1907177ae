/* SPDX-License-Identifier: MIT */
/* Report what is known about pages, also while protecting them again. */
#ifndef UFFD_ENGINE_STATES_H
#define UFFD_ENGINE_STATES_H

#include "core.h"

int uffd_engine_states(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		       uint64_t first_page, uint64_t pages, uint8_t *states_ret);

/* Why pages are protected: what becomes of what is known to be written. */
enum uffd_protect {
	UFFD_UNPROTECT,			/* not protected: the pages that are there are dirty then */
	UFFD_PROTECT,			/* the caller learns it from the states */
	UFFD_PROTECT_TO_EVICT,		/* it is noted for the next checkpoint */
	UFFD_PROTECT_TO_CHECK,		/* this is the checkpoint: what was noted is WRITTEN */
};

/*
 * Write-protect pages, and return the state of each at the instant of its protection: a
 * write comes before that and shows in the state, or after it and makes the page dirty
 * again.  On an error, pages that were dirty and protected so far become dirty again.
 * `how`: enum uffd_protect.
 */
int uffd_engine_writeprotect(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			     uint64_t offset, uint64_t length, uint32_t how,
			     uint8_t *states_ret);

/* Note pages that are present already, as far as the owner's page table tells. */
int uffd_engine_take_in(struct uffd_engine *engine, const struct uffd_range_ref *ref);

#endif /* UFFD_ENGINE_STATES_H */
