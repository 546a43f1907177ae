/* SPDX-License-Identifier: MIT */
/* Ranges are put in. */
#ifndef UFFD_ENGINE_SERVE_H
#define UFFD_ENGINE_SERVE_H

#include "core.h"

/*
 * Put a range in, before it is registered.  `id_ret` names it in the calls below,
 * wherever it is moved.  -EEXIST: it overlaps one that is served; -ENODATA: the
 * source ends before the range's last page.
 */
int uffd_engine_add(struct uffd_engine *engine, uint32_t space,
		    const struct uffd_range_spec *spec, uint64_t *id_ret);
int uffd_engine_set_ioctls(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			   uint64_t ioctls);

/* From now on, poison every page that is asked for instead of filling it. */
void uffd_engine_refuse(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_SERVE_H */
