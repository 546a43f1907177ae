/* SPDX-License-Identifier: MIT */
/* Add ranges. */
#ifndef UFFD_ENGINE_SERVE_H
#define UFFD_ENGINE_SERVE_H

#include "core.h"

/*
 * Add a range, before it is registered.  It is closed until its ioctls are set, see open.h.
 * `id_ret` names it from now on, wherever it is moved.  -EEXIST: it overlaps a served range;
 * -ENODATA: the source ends before the range's last page.
 */
int uffd_engine_add(struct uffd_engine *engine, uint32_t space,
		    const struct uffd_range_spec *spec, uint64_t *id_ret);

/*
 * Note memory that is registered in a space besides its ranges, before the ioctl, and
 * memory that was unregistered, after it.  Once all of it is known, a fault in other memory
 * that is in one mapping with a range counts as growth of that mapping.
 */
int uffd_engine_note_registered(struct uffd_engine *engine, uint32_t space, uint64_t start,
				uint64_t end);
int uffd_engine_know_registered(struct uffd_engine *engine, uint32_t space);
int uffd_engine_note_unregistered(struct uffd_engine *engine, uint32_t space, uint64_t start,
				  uint64_t end);

/* From now on, poison pages instead of filling them from a source. */
void uffd_engine_refuse(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_SERVE_H */
