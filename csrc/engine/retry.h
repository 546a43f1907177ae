/* SPDX-License-Identifier: MIT */
/* Try again what has stalled. */
#ifndef UFFD_ENGINE_RETRY_H
#define UFFD_ENGINE_RETRY_H

#include "core.h"

/*
 * Wake the threads that wait in [offset, offset + length), so that they fault again; pages
 * that a source has promised become absent, so that it is asked again.  `failed_ret`: the
 * pages whose content could not be read so far.
 */
int uffd_engine_retry(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		      uint64_t offset, uint64_t length, uint64_t *failed_ret);

#endif /* UFFD_ENGINE_RETRY_H */
