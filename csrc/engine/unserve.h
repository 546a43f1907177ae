/* SPDX-License-Identifier: MIT */
/* Taking ranges out. */
#ifndef UFFD_ENGINE_UNSERVE_H
#define UFFD_ENGINE_UNSERVE_H

#include "patience.h"

/*
 * Take a range out of its space and of the forks that have it.  SEAL: first poison
 * what is absent (its content would be zeros otherwise) and lift write-protection;
 * where the range takes no POISON, absent pages are filled instead.  Forks are sealed
 * in any case: memory that goes away here lives on there.  UNREGISTER: what is left
 * of it.  `patience_ns`: how long to wait for threads at its pages before those are
 * poisoned, too.  After an error it is served as before, as far as it was not taken out.
 */
#define UFFD_UNSERVE_SEAL	1
#define UFFD_UNSERVE_UNREGISTER	2
#define UFFD_UNSERVE_GENTLY	4	/* -ETIME instead of poisoning pages in flight */
int uffd_engine_unserve(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			uint32_t flags, uint64_t patience_ns);

/* In its space alone. */
int unserve_in(struct uffd_engine *engine, const struct uffd_range_ref *ref, uint32_t flags,
	       struct patience *patience);

#endif /* UFFD_ENGINE_UNSERVE_H */
