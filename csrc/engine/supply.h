/* SPDX-License-Identifier: MIT */
/* Fill absent pages with content that the caller has, beside faults. */
#ifndef UFFD_ENGINE_SUPPLY_H
#define UFFD_ENGINE_SUPPLY_H

#include "core.h"

/*
 * Fill the absent pages of [offset, offset + length) from memory of this process, those
 * that a worker was asked for included; pages that are there keep what they hold.
 * `unprotected`: they arrive writable, and count as written.  `filled_ret`: bytes;
 * `reached_ret`: the offset where it stopped.
 */
int uffd_engine_fill(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     uint64_t offset, uint64_t length, const void *data, uint32_t unprotected,
		     uint64_t *filled_ret, uint64_t *reached_ret);

/*
 * The same from memory that does not fault, without patience: -EAGAIN at a page that another
 * thread fills, or while the layout changes.
 */
int supply_some(struct uffd_engine *engine, const struct uffd_range_ref *ref, uint64_t offset,
		uint64_t length, const void *data, uint64_t *filled_ret);

#endif /* UFFD_ENGINE_SUPPLY_H */
