/* SPDX-License-Identifier: MIT */
/* Add and register many ranges by one call. */
#ifndef UFFD_ENGINE_SERVE_MANY_H
#define UFFD_ENGINE_SERVE_MANY_H

#include "core.h"

struct uffd_served {
	uint64_t id;		/* 0: it is not served */
	uint64_t ioctls;
};

/*
 * Serve ranges: add each, register it, look for pages that are present, and open it.
 * `needed`: bits of ioctls that each range must support.
 *
 * It ends with the first range that cannot be served, of which nothing is left then, and
 * returns its error; @served_ret has those before it.
 */
int uffd_engine_serve_many(struct uffd_engine *engine, uint32_t space,
			   const struct uffd_range_spec *specs, uint64_t count, uint64_t needed,
			   struct uffd_served *served_ret);

#endif /* UFFD_ENGINE_SERVE_MANY_H */
