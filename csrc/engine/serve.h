/* SPDX-License-Identifier: MIT */
/* Add ranges. */
#ifndef UFFD_ENGINE_SERVE_H
#define UFFD_ENGINE_SERVE_H

#include "core.h"

/*
 * Add a range, before it is registered.  `id_ret` names it from now on, wherever it is
 * moved.  -EEXIST: it overlaps a served range; -ENODATA: the source ends before the
 * range's last page.
 */
int uffd_engine_add(struct uffd_engine *engine, uint32_t space,
		    const struct uffd_range_spec *spec, uint64_t *id_ret);
int uffd_engine_set_ioctls(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			   uint64_t ioctls);

/* From now on, poison pages instead of filling them from a source. */
void uffd_engine_refuse(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_SERVE_H */
