// SPDX-License-Identifier: MIT
/* Try again what has stalled, once the source has recovered. */
#define _GNU_SOURCE
#include <errno.h>

#include "answer.h"
#include "failures.h"
#include "left.h"
#include "promise.h"
#include "queue.h"
#include "retry.h"
#include "slices.h"
#include "stats.h"
#include "uffd_shim.h"

static bool overlaps(const struct uffd_request *request, uint64_t id, uint64_t offset,
		     uint64_t end)
{
	return request->id == id && request->offset < end &&
	       offset < request->offset + request->length;
}

/* The source has asked somebody who may never answer. */
static void break_promises(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			   uint64_t offset, uint64_t end)
{
	struct uffd_request *request, copy;

	do {
		pthread_mutex_lock(&engine->requests_lock);
		TAILQ_FOREACH(request, &engine->promised, link)
			if (request->space == ref->space &&
			    overlaps(request, ref->id, offset, end))
				break;
		if (request) {
			populate_answered(engine, request, 0, -ECANCELED);
			atomic_fetch_sub(&engine->outstanding, 1);
			copy_request(&copy, request);
			forget_promise(engine, request);
		}
		pthread_mutex_unlock(&engine->requests_lock);
		if (request)
			return_pages(engine, &copy);
	} while (request);
}

static uint64_t wake_slice(const struct slices *all, struct uffd_range *range, uint64_t at,
			   uint64_t end, int *error_ret, uint64_t *done_ret)
{
	uint64_t from = content_offset(range, at);

	(void)all;
	*done_ret = count_failed(range, from, from + (end - at));
	*error_ret = uffd_shim_wake(range->space->fd, at, end - at);
	wake_left(range, at, end);
	return *error_ret ? at : end;
}

int uffd_engine_retry(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		      uint64_t offset, uint64_t length, uint64_t *failed_ret)
{
	uint64_t reached;

	/* A thread that continues may be ahead of its page's state. */
	await_work(engine);
	break_promises(engine, ref, offset, offset + length);
	return for_slices(&(struct slices){ engine, *ref, offset, offset + length, wake_slice,
					    NULL, NULL, 0 }, failed_ret, &reached);
}
