/* SPDX-License-Identifier: MIT */
/*
 * Requests whose source will not answer itself: it has asked somebody for the content,
 * which comes by uffd_engine_fill().
 */
#ifndef UFFD_ENGINE_PROMISE_H
#define UFFD_ENGINE_PROMISE_H

#include "core.h"

/* For the worker that has the request; the pages may have been filled already. */
void promise_request(struct uffd_engine *engine, struct uffd_request *request);
/* End the requests whose pages no longer wait. */
void settle_promises(struct uffd_engine *engine);
/* With the requests' lock held: take a promised request off the list and free it. */
void forget_promise(struct uffd_engine *engine, struct uffd_request *request);

#endif /* UFFD_ENGINE_PROMISE_H */
