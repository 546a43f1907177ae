/* SPDX-License-Identifier: MIT */
/* Workers: they wait for the next page to fetch, and lead while they wait. */
#ifndef UFFD_ENGINE_REQUEST_H
#define UFFD_ENGINE_REQUEST_H

#include "core.h"

/*
 * For workers: wait for pages to fetch; lead while waiting if there is no leader.
 * NULL: the engine is stopping.  The request is the worker's until it completes or
 * fails it.
 */
struct uffd_request *uffd_engine_next_request(struct uffd_engine *engine);
/* Complete a request and wait for the next; errors are counted and noted. */
struct uffd_request *uffd_engine_complete_next(struct uffd_engine *engine,
					       struct uffd_request *request, const void *data);

/* The request's content comes by uffd_engine_fill(); wait for the next. */
struct uffd_request *uffd_engine_promise_next(struct uffd_engine *engine,
					      struct uffd_request *request);

/* The timer has fired: whether the native thread must lead.  With the requests' lock held. */
bool leads_after_watchdog(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_REQUEST_H */
