// SPDX-License-Identifier: MIT
/* Requests for workers: queueing them, and pacing those of populate. */
#define _GNU_SOURCE
#include "alloc.h"
#include "queue.h"
#include "base/clock.h"

/* A thread waits for a fault's pages: before those that populate asks for. */
static void insert_request(struct uffd_engine *engine, struct uffd_request *request)
{
	struct uffd_request *first = NULL;

	if (request->is_fault)
		TAILQ_FOREACH(first, &engine->queued, link)
			if (first->populate)
				break;
	if (first)
		TAILQ_INSERT_BEFORE(first, request, link);
	else
		TAILQ_INSERT_TAIL(&engine->queued, request, link);
}

bool queue_request(struct uffd_range *range, uint64_t at, uint64_t end,
		   const struct deferred_fault *fault, struct populate *populate)
{
	struct uffd_engine *engine = range->space->engine;
	struct uffd_request *request = uffd_alloc(sizeof(*request));

	if (!request)
		return false;
	request->id = range->id;
	request->offset = content_offset(range, at);
	request->length = end - at;
	request->address = at;
	request->since_ns = uffd_now_ns();
	request->space = range->space->number;
	request->page_size = range->page_size;
	if (fault) {
		request->flags = (uint32_t)fault->flags;
		request->thread_id = fault->thread_id;
		request->fault_address = fault->address;
		request->fault_offset = content_offset(range, page_of(range, fault->address));
		request->is_fault = true;
	}
	request->populate = populate;
	count(engine, COUNTER(requests), 1);
	pthread_mutex_lock(&engine->requests_lock);
	insert_request(engine, request);
	atomic_fetch_add(&engine->outstanding, 1);
	if (populate) {
		populate->queued++;
		populate->outstanding++;
	}
	/* A worker that leads takes the first itself; populate runs in another thread. */
	if (atomic_fetch_add(&engine->queued_count, 1) == 0 && engine->leader == LEADER_WORKER) {
		if (!pthread_equal(engine->leader_thread, pthread_self()))
			kick_leader(engine);
	} else if (engine->idle_workers) {
		pthread_cond_signal(&engine->requests_changed);
	}
	pthread_mutex_unlock(&engine->requests_lock);
	return true;
}

void free_requests(struct uffd_engine *engine)
{
	struct uffd_request *request;

	while ((request = TAILQ_FIRST(&engine->queued))) {
		TAILQ_REMOVE(&engine->queued, request, link);
		uffd_free(request);
	}
	while ((request = TAILQ_FIRST(&engine->taken))) {
		TAILQ_REMOVE(&engine->taken, request, link);
		uffd_free(request);
	}
	while ((request = TAILQ_FIRST(&engine->promised))) {
		TAILQ_REMOVE(&engine->promised, request, link);
		uffd_pages_put(request->pages);
		uffd_free(request);
	}
}

#define GROWTH			8
/* An answer is quick within this part of the stall limit, */
#define QUICK_PART		4
#define QUICK_NS		500000000ull	/* or this if there is no limit. */

/* With the lock held. */
static void set_pace(struct uffd_engine *engine, struct populate *populate,
		     const struct uffd_request *request)
{
	uint64_t took = uffd_now_ns() - request->taken_ns;
	uint64_t limit = engine->options.stall_limit_ns;
	uint64_t quick = limit ? limit / QUICK_PART : QUICK_NS;

	if (took > quick && populate->chunk > request->page_size) {
		populate->chunk /= GROWTH;
		if (populate->chunk < request->page_size)
			populate->chunk = request->page_size;
	} else if (took * GROWTH <= quick && request->length >= populate->chunk) {
		populate->chunk *= GROWTH;
		if (populate->chunk > populate->limit)
			populate->chunk = populate->limit;
	}
}

void populate_answered(struct uffd_engine *engine, struct uffd_request *request, uint64_t filled,
		       int error)
{
	struct populate *populate = request->populate;

	if (!populate)
		return;
	request->populate = NULL;
	populate->outstanding--;
	populate->filled += filled;
	if (error && !populate->error) {
		populate->error = error;
		populate->failed_at = request->address;
	}
	if (!error && populate->paced)
		set_pace(engine, populate, request);
	pthread_cond_broadcast(&engine->populates_changed);
}

void populate_taken(struct uffd_engine *engine, struct uffd_request *request)
{
	request->taken_ns = engine->last_taken_ns = uffd_now_ns();
	if (!request->populate)
		return;
	request->populate->queued--;
	pthread_cond_broadcast(&engine->populates_changed);
}
