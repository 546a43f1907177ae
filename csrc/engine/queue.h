/* SPDX-License-Identifier: MIT */
/* Pages whose content somebody else must fetch: who waits for them, and how many. */
#ifndef UFFD_ENGINE_QUEUE_H
#define UFFD_ENGINE_QUEUE_H

#include "core.h"

/* One call that workers fetch pages for, on its stack; under the requests' lock. */
struct populate {
	uint64_t chunk;		/* bytes to ask for at a time, now */
	uint64_t limit;		/* and at most */
	bool paced;		/* between a page and `limit`, as quickly as answers come */
	uint32_t queued;	/* requests that no worker has taken */
	uint32_t outstanding;	/* those and the taken ones */
	uint64_t filled;	/* bytes */
	uint64_t failed_at;	/* the first page without content, and why */
	int error;
};

/* Either a fault asks, or a call of populate. */
bool queue_request(struct uffd_range *range, uint64_t at, uint64_t end,
		   const struct deferred_fault *fault, struct populate *populate);
void free_requests(struct uffd_engine *engine);
/* Both with the requests' lock held, for any request. */
void populate_taken(struct uffd_engine *engine, struct uffd_request *request);
void populate_answered(struct uffd_engine *engine, struct uffd_request *request, uint64_t filled,
		       int error);

#endif /* UFFD_ENGINE_QUEUE_H */
