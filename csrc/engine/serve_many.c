// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>

#include "serve.h"
#include "serve_many.h"
#include "space.h"
#include "uffd_shim.h"
#include "unserve.h"

static int serve_one(struct uffd_space *space, const struct uffd_range_spec *spec,
		     uint64_t needed, struct uffd_served *served)
{
	struct uffd_engine *engine = space->engine;
	struct uffd_range_ref ref = { .space = space->number, .start = spec->start };
	uint64_t end = spec->start + spec->length, ioctls = 0;
	uint32_t flags = 0;
	int r = uffd_engine_add(engine, ref.space, spec, &ref.id);

	if (r)
		return r;
	r = uffd_engine_note_registered(engine, ref.space, spec->start, end);
	if (r == 0)
		r = uffd_shim_register(space->fd, spec->start, spec->length, spec->mode, &ioctls);
	if (r == 0 && (ioctls & needed) != needed) {
		flags = UFFD_UNSERVE_UNREGISTER;
		r = -EOPNOTSUPP;
	}
	if (r == 0)
		r = uffd_engine_set_ioctls(engine, &ref, ioctls);
	if (r) {
		uffd_engine_unserve(engine, &ref, flags, 0);
		return r;
	}
	/* The message of a thread that waits here already may have been read before. */
	uffd_shim_wake(space->fd, spec->start, spec->length);
	*served = (struct uffd_served){ ref.id, ioctls };
	return 0;
}

int uffd_engine_serve_many(struct uffd_engine *engine, uint32_t number,
			   const struct uffd_range_spec *specs, uint64_t count, uint64_t needed,
			   struct uffd_served *served_ret)
{
	struct uffd_space *space = space_get(engine, number);
	uint64_t done;
	int r = 0;

	if (!space)
		return -ESRCH;
	for (done = 0; done < count && r == 0; done++)
		r = serve_one(space, &specs[done], needed, &served_ret[done]);
	space_put(space);
	return r;
}
