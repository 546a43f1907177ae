/* SPDX-License-Identifier: MIT */
/* Requests for workers: queueing them, and pacing those of populate. */
#ifndef UFFD_ENGINE_QUEUE_H
#define UFFD_ENGINE_QUEUE_H

#include "core.h"

/* A call of populate that workers fetch pages for; on its stack, under the requests' lock. */
struct populate {
	uint64_t chunk;		/* bytes per request, now */
	uint64_t limit;		/* and at most */
	bool paced;		/* `chunk` follows the answers, between a page and `limit` */
	uint32_t queued;	/* requests not taken by a worker */
	uint32_t outstanding;	/* queued or taken */
	uint64_t filled;	/* bytes */
	uint64_t failed_at;	/* the first page without content, and why */
	int error;
};

/* Queue a request, for a fault or for a call of populate; the other is NULL. */
bool queue_request(struct uffd_range *range, uint64_t at, uint64_t end,
		   const struct deferred_fault *fault, struct populate *populate);
void free_requests(struct uffd_engine *engine);
/* Call both with the requests' lock held, for every request. */
void populate_taken(struct uffd_engine *engine, struct uffd_request *request);
void populate_answered(struct uffd_engine *engine, struct uffd_request *request, uint64_t filled,
		       int error);

#endif /* UFFD_ENGINE_QUEUE_H */
