// SPDX-License-Identifier: MIT
/*
 * Filling the absent pages of a serving whose content workers fetch.
 *
 * They are asked for a chunk at a time.  One that fails is asked for again in halves,
 * and the page that fails by itself goes back to absent: the caller is told, and nobody
 * waits for it.  With a chunk of 0 the first request is a page, and they grow as long as
 * answers are quick: a source that needs a while for each page must not be given so many
 * that it is taken for a stalled one.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "alloc.h"
#include "core.h"

/* Where it grows to: the cost of asking is a thousandth of the copying by then. */
#define PACED_LIMIT		(1u << 20)
#define GROWTH			8
/* How long an answer may take, as a part of the time after which it is given up. */
#define QUICK_PART		4
#define QUICK_NS		500000000ull	/* where it is never given up */
/* Requests that wait for a worker, so that none waits for us. */
#define BACKLOG			32
/* Pages are looked through in pieces, so that faults get between. */
#define ASK_SLICE		(4u << 20)

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

/* Wait until another request may be queued; returns an error if none may. */
static int await_turn(struct uffd_engine *engine, struct populate *populate)
{
	int r = 0;

	pthread_mutex_lock(&engine->requests_lock);
	while (!populate->error && !atomic_load(&engine->stop) &&
	       populate->queued >= (populate->chunk < populate->limit ? 1 : BACKLOG))
		pthread_cond_wait(&engine->populates_changed, &engine->requests_lock);
	if (populate->error)
		r = populate->error;
	else if (atomic_load(&engine->stop) || atomic_load(&engine->end.began))
		r = -ECANCELED;
	pthread_mutex_unlock(&engine->requests_lock);
	return r;
}

/* Queue the next run of absent pages; where nothing is absent, go on behind a slice. */
static int ask_next(struct uffd_range *range, uint64_t *offset, uint64_t end,
		    struct populate *populate)
{
	uint64_t at = range->start + (*offset - range->origin), limit, stop;
	int r = 0;

	limit = range->end - at < end - *offset ? range->end : at + (end - *offset);
	if (limit - at > ASK_SLICE && ASK_SLICE >= range->page_size)
		limit = at + ASK_SLICE;
	while (at < limit && atomic_load(state_of(range, at)) != UFFD_PAGE_ABSENT)
		at += range->page_size;
	for (stop = at; stop < limit && stop - at < populate->chunk; stop += range->page_size) {
		uint8_t expected = UFFD_PAGE_ABSENT;

		if (!atomic_compare_exchange_strong(state_of(range, stop), &expected,
						    UFFD_PAGE_REQUESTED))
			break;
	}
	if (stop > at && !queue_request(range, at, stop, NULL, populate)) {
		unclaim(range, at, stop, UFFD_PAGE_ABSENT);
		stop = at;
		r = -ENOMEM;
	}
	*offset = content_offset(range, stop);
	return r;
}

static int ask_for_all(struct uffd_engine *engine, const struct serving *serving,
		       uint64_t offset, uint64_t end, struct populate *populate)
{
	int r = 0;

	while (r == 0 && offset < end) {
		struct uffd_range *range = NULL;
		struct visit visit;

		r = await_turn(engine, populate);
		if (r)
			break;
		if (!open_visit(engine, serving->space, &visit))
			return -ESRCH;
		if (!atomic_load(&visit.space->gone))
			range = find_piece(visit.space, serving->id, offset,
					   serving->start + offset);
		if (range)
			r = ask_next(range, &offset, end, populate);
		else
			r = atomic_load(&visit.space->gone) ? -ESRCH : -ENOENT;
		shut_visit(&visit);
	}
	return r;
}

/* Nobody has the address of `populate` afterwards. */
static int finish(struct uffd_engine *engine, struct populate *populate)
{
	struct request_list *lists[] = { &engine->queued, &engine->taken };
	struct uffd_request *request;
	int r;

	pthread_mutex_lock(&engine->requests_lock);
	while (populate->outstanding && !atomic_load(&engine->stop))
		pthread_cond_wait(&engine->populates_changed, &engine->requests_lock);
	r = populate->outstanding ? -ECANCELED : populate->error;
	for (size_t i = 0; i < 2; i++)
		TAILQ_FOREACH(request, lists[i], link)
			if (request->populate == populate)
				request->populate = NULL;
	pthread_mutex_unlock(&engine->requests_lock);
	return r;
}

/* Somebody else's fault may have asked for a page before us. */
static bool has_pages_in_flight(struct uffd_engine *engine, const struct serving *serving,
				uint64_t offset, uint64_t end)
{
	struct uffd_range *range = NULL;
	struct visit visit;
	bool found = false;

	if (!open_visit(engine, serving->space, &visit))
		return false;
	range = any_piece(visit.space, serving->id, serving->start);
	if (range)
		for (; offset < end && !found; offset += range->page_size)
			found = uffd_page_is_in_flight(
				atomic_load(&range->pages->state[offset >> range->page_shift]));
	shut_visit(&visit);
	return found;
}

int populate_by_request(struct uffd_engine *engine, const struct serving *serving,
			uint64_t page_size, uint64_t offset, uint64_t end, uint64_t chunk,
			struct uffd_populate_result *result)
{
	uint64_t limit = PACED_LIMIT > page_size ? PACED_LIMIT : page_size;
	struct populate populate = {
		.paced = !chunk,
		.chunk = chunk ? chunk : page_size,
		.limit = chunk ? chunk : limit,
	};
	int r = ask_for_all(engine, serving, offset, end, &populate), finished;
	unsigned int attempt = 0;

	finished = finish(engine, &populate);
	result->filled = populate.filled;
	result->failed_at = populate.failed_at;
	while (r == 0 && finished == 0 && atomic_load(&engine->outstanding) &&
	       !atomic_load(&engine->stop) && has_pages_in_flight(engine, serving, offset, end))
		uffd_back_off(attempt++);
	return r ? r : finished;
}
