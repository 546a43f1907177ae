/* SPDX-License-Identifier: MIT */
/* Take ranges out. */
#ifndef UFFD_ENGINE_UNSERVE_H
#define UFFD_ENGINE_UNSERVE_H

#include "patience.h"

/*
 * Take a range out of its space and of the forks that have it.  SEAL: first poison
 * absent pages (they would read as zeros) and remove write-protection; if the range
 * does not support POISON, fill absent pages instead.  Forks are always sealed: memory
 * that goes away here lives on there.  UNREGISTER: also unregister the pieces.
 * `patience_ns`: how long to wait for threads at its pages before poisoning those as
 * well.  After an error, pieces not yet taken out are still served.
 */
#define UFFD_UNSERVE_SEAL	1
#define UFFD_UNSERVE_UNREGISTER	2
#define UFFD_UNSERVE_GENTLY	4	/* -ETIME instead of poisoning pages in flight */
int uffd_engine_unserve(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			uint32_t flags, uint64_t patience_ns);

/*
 * The same for [offset, offset + length) of a range: what is left of a piece stays served,
 * without an instant in which a fault there is not.
 */
int uffd_engine_unserve_part(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			     uint64_t offset, uint64_t length, uint32_t flags,
			     uint64_t patience_ns);

/* A whole range, in one space only. */
int unserve_in(struct uffd_engine *engine, const struct uffd_range_ref *ref, uint32_t flags,
	       struct patience *patience);

/* Find out which vacated places are still registered, see left.h. */
void settle_moves(struct uffd_engine *engine, struct patience *patience);

#endif /* UFFD_ENGINE_UNSERVE_H */
