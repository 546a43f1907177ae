// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>

#include "open.h"
#include "serve.h"
#include "serve_many.h"
#include "unserve.h"

static int serve_one(struct uffd_engine *engine, uint32_t space, const struct uffd_range_spec *spec,
		     uint64_t needed, struct uffd_served *served)
{
	struct uffd_opening opening = {
		.present = UFFD_PRESENT_REFUSE,
		.pagemap_fd = -1,
		.needed = needed,
	};
	struct uffd_range_ref ref = { .space = space, .start = spec->start };
	int r = uffd_engine_add(engine, space, spec, &ref.id);

	if (r)
		return r;
	r = uffd_engine_open(engine, &ref, &opening);
	if (r) {
		uffd_engine_unserve(engine, &ref, 0, 0);
		return r;
	}
	*served = (struct uffd_served){ ref.id, opening.ioctls };
	return 0;
}

int uffd_engine_serve_many(struct uffd_engine *engine, uint32_t space,
			   const struct uffd_range_spec *specs, uint64_t count, uint64_t needed,
			   struct uffd_served *served_ret)
{
	int r = 0;

	for (uint64_t done = 0; done < count && r == 0; done++)
		r = serve_one(engine, space, &specs[done], needed, &served_ret[done]);
	return r;
}
