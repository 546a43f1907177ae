// SPDX-License-Identifier: MIT
/* Requests whose content comes by uffd_engine_fill(). */
#define _GNU_SOURCE
#include "alloc.h"
#include "promise.h"
#include "queue.h"
#include "range.h"
#include "slices.h"
#include "stats.h"

/* Whether a page of it still waits. */
static bool is_awaited(const struct uffd_request *request)
{
	uint64_t end = request->offset + request->length;

	for (uint64_t offset = request->offset; offset < end; offset += request->page_size)
		if (atomic_load(&request->pages->state[offset / request->page_size]) ==
		    UFFD_PAGE_REQUESTED)
			return true;
	return false;
}

void forget_promise(struct uffd_engine *engine, struct uffd_request *request)
{
	TAILQ_REMOVE(&engine->promised, request, link);
	atomic_fetch_sub(&engine->promised_count, 1);
	uffd_pages_put(request->pages);
	uffd_free(request);
}

void settle_promises(struct uffd_engine *engine)
{
	struct uffd_request *request, *next;

	if (!atomic_load(&engine->promised_count))
		return;
	pthread_mutex_lock(&engine->requests_lock);
	for (request = TAILQ_FIRST(&engine->promised); request; request = next) {
		next = TAILQ_NEXT(request, link);
		if (is_awaited(request))
			continue;
		if (request->is_fault)
			note_fault(engine, request->space, request->fault_address, request->flags,
				   request->thread_id, request->since_ns);
		populate_answered(engine, request, request->length, 0);
		atomic_fetch_sub(&engine->outstanding, 1);
		forget_promise(engine, request);
	}
	pthread_mutex_unlock(&engine->requests_lock);
}

/* The states of the pages of a range; NULL: it is no longer served. */
static struct uffd_pages *pages_of(struct uffd_engine *engine, const struct uffd_request *request)
{
	struct uffd_pages *pages = NULL;
	struct uffd_range *range;
	struct access access;

	if (!open_access(engine, request->space, &access))
		return NULL;
	range = any_piece(access.space, request->id, request->address);
	if (range)
		pages = uffd_pages_get(range->pages);
	close_access(&access);
	return pages;
}

void promise_request(struct uffd_engine *engine, struct uffd_request *request)
{
	struct uffd_pages *pages = pages_of(engine, request);

	pthread_mutex_lock(&engine->requests_lock);
	TAILQ_REMOVE(&engine->taken, request, link);
	if (request->abandoned || !pages) {
		populate_answered(engine, request, 0, 0);
		if (!request->abandoned)
			atomic_fetch_sub(&engine->outstanding, 1);
		if (pages)
			uffd_pages_put(pages);
		uffd_free(request);
	} else {
		request->pages = pages;
		TAILQ_INSERT_TAIL(&engine->promised, request, link);
		atomic_fetch_add(&engine->promised_count, 1);
	}
	pthread_mutex_unlock(&engine->requests_lock);
	/* The content may have come before the source returned. */
	settle_promises(engine);
}
