/* SPDX-License-Identifier: MIT */
/* Workers, who ask for the next page to fetch and lead meanwhile. */
#ifndef UFFD_ENGINE_REQUEST_H
#define UFFD_ENGINE_REQUEST_H

#include "core.h"

/*
 * For workers: wait for a page whose content must be fetched, leading meanwhile
 * when nobody else does.  NULL: the engine is stopping.  The request is the
 * worker's until it completes or fails it.
 */
struct uffd_request *uffd_engine_next_request(struct uffd_engine *engine);
/* Both in one call; what goes wrong is counted and noted. */
struct uffd_request *uffd_engine_complete_next(struct uffd_engine *engine,
					       struct uffd_request *request, const void *data);

/* The timer has fired: whether nobody has led for so long; with the requests' lock held. */
bool leads_after_watchdog(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_REQUEST_H */
