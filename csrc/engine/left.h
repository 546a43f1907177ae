/* SPDX-License-Identifier: MIT */
/* Memory that mremap(2) with MREMAP_DONTUNMAP has left behind. */
#ifndef UFFD_ENGINE_LEFT_H
#define UFFD_ENGINE_LEFT_H

#include "core.h"

/*
 * With the gate closed: find out which vacated places are still registered.  Anonymous
 * memory there is unregistered, and is zeros as without userfaultfd.  Memory of a file is a
 * piece again: the pages that are absent in the new place may be absent there too.  `leads`: the
 * caller is the leader.  False: the layout is changing, so some are still unknown.
 */
bool settle_vacated(struct uffd_space *space, bool leads);
/*
 * With the gate entered: threads that wait in another place for pages of shared memory which
 * are settled in [at, end) must fault again.
 */
void wake_left(const struct uffd_range *range, uint64_t at, uint64_t end);
/* For the leader. */
void settle_all_vacated(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_LEFT_H */
