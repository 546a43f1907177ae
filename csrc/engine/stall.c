// SPDX-License-Identifier: MIT
/* Requests without an answer: give them up as they get too old, or all at once. */
#define _GNU_SOURCE
#include <errno.h>

#include "answer.h"
#include "failures.h"
#include "pause.h"
#include "promise.h"
#include "queue.h"
#include "resolve.h"
#include "say.h"
#include "stall.h"
#include "stats.h"
#include "tracebacks.h"
#include "base/clock.h"

/* With the requests' lock held: from now on an answer is too late. */
static void abandon(struct uffd_engine *engine, struct request_list *list,
		    struct uffd_request *request, struct uffd_request *copy_ret)
{
	__atomic_store_n(&request->abandoned, 1, __ATOMIC_RELEASE);
	copy_request(copy_ret, request);
	request->populate = NULL;
	if (list == &engine->queued && copy_ret->populate)
		copy_ret->populate->queued--;
	/* No worker has it. */
	if (list == &engine->promised)
		forget_promise(engine, request);
}

/* Clean up after an abandoned request, from a copy: the request may be freed by now. */
static void clean_up(struct uffd_engine *engine, struct uffd_request *copy, int error,
		     enum uffd_failure_stage stage)
{
	give_up_pages(engine, copy, copy->offset, copy->offset + copy->length, error, stage);
	atomic_fetch_sub(&engine->outstanding, 1);
	pthread_mutex_lock(&engine->requests_lock);
	populate_answered(engine, copy, 0, error ? error : -ECANCELED);
	pthread_mutex_unlock(&engine->requests_lock);
}

/* Requests of one range, or (id 0) of all, that ask for nothing outside [offset, end). */
struct asked {
	uint64_t id, offset, end;
};

static bool is_among(const struct uffd_request *request, const struct asked *asked)
{
	return !request->abandoned &&
	       (!asked->id || (request->id == asked->id && request->offset >= asked->offset &&
			       request->offset + request->length <= asked->end));
}

static void abandon_all(struct uffd_engine *engine, const struct asked *asked, int error)
{
	struct request_list *lists[] = { &engine->queued, &engine->taken, &engine->promised };
	struct uffd_request *request, copy;

	for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++) {
		do {
			pthread_mutex_lock(&engine->requests_lock);
			TAILQ_FOREACH(request, lists[i], link)
				if (is_among(request, asked))
					break;
			if (request)
				abandon(engine, lists[i], request, &copy);
			pthread_mutex_unlock(&engine->requests_lock);
			/* Requests made since then are not waited for. */
			if (request && copy.since_ns > atomic_load(&engine->drained_ns))
				clean_up(engine, &copy, 0, UFFD_FAILED_NOTHING);
			else if (request)
				clean_up(engine, &copy, error, UFFD_FAILED_NOTHING);
		} while (request);
	}
}

void uffd_engine_abandon(struct uffd_engine *engine, uint64_t id, int32_t error)
{
	abandon_all(engine, &(struct asked){ id, 0, UINT64_MAX }, -error);
}

/* The n-th request that asks for some of these pages of a range. */
static bool copy_overlapping(struct uffd_engine *engine, const struct asked *asked, uint32_t n,
			     struct uffd_request *copy_ret)
{
	struct request_list *lists[] = { &engine->queued, &engine->taken, &engine->promised };
	struct uffd_request *request;
	bool found = false;

	pthread_mutex_lock(&engine->requests_lock);
	for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]) && !found; i++)
		TAILQ_FOREACH(request, lists[i], link) {
			if (request->id != asked->id || request->offset >= asked->end ||
			    request->offset + request->length <= asked->offset || n--)
				continue;
			copy_request(copy_ret, request);
			found = true;
			break;
		}
	pthread_mutex_unlock(&engine->requests_lock);
	return found;
}

void uffd_engine_abandon_part(struct uffd_engine *engine, uint64_t id, uint64_t offset,
			      uint64_t length)
{
	struct asked asked = { id, offset, offset + length };
	struct uffd_request copy;

	abandon_all(engine, &asked, 0);
	/* Requests for pages inside and outside: they continue for those outside. */
	for (uint32_t n = 0; copy_overlapping(engine, &asked, n, &copy); n++)
		give_up_pages(engine, &copy, higher(copy.offset, asked.offset),
			      lower(copy.offset + copy.length, asked.end), 0,
			      UFFD_FAILED_NOTHING);
	settle_promises(engine);
}

uint32_t uffd_engine_hung(struct uffd_engine *engine)
{
	struct uffd_request *request;
	uint32_t hung = 0;

	pthread_mutex_lock(&engine->requests_lock);
	TAILQ_FOREACH(request, &engine->taken, link)
		hung += request->abandoned;
	pthread_mutex_unlock(&engine->requests_lock);
	return hung;
}

static void show_tracebacks(struct uffd_engine *engine)
{
	if (engine->options.stall_signal)
		uffd_show_tracebacks((int)engine->options.stall_signal,
				     engine->options.has_gil);
}

/*
 * Since when the source has been waited for.  A fault's thread waits from its fault on.
 * For populate the worker's time counts: as long as workers keep taking requests, the
 * queued ones are not stalled.
 */
static uint64_t waited_since(const struct uffd_engine *engine, const struct uffd_request *request)
{
	uint64_t since = request->is_fault ? request->since_ns
		: request->taken_ns ? request->taken_ns
		: higher(engine->last_taken_ns, request->since_ns);

	return higher(since, atomic_load(&engine->pause.ended_ns));
}

/*
 * The oldest request of a list that waits for a source.  A request whose source has
 * answered does not: answer.c limits how long its pages are retried.
 */
static struct uffd_request *find_oldest(const struct uffd_engine *engine,
					struct request_list *list)
{
	struct uffd_request *request, *oldest = NULL;

	TAILQ_FOREACH(request, list, link)
		if (!request->abandoned && !request->reported &&
		    !__atomic_load_n(&request->answered, __ATOMIC_ACQUIRE) &&
		    (!oldest || waited_since(engine, request) < waited_since(engine, oldest)))
			oldest = request;
	return oldest;
}

/* Whether a worker waits for memory, for a page whose content it has. */
static bool any_lacks_memory(const struct uffd_engine *engine)
{
	const struct uffd_request *request;

	TAILQ_FOREACH(request, &engine->taken, link)
		if (__atomic_load_n(&request->lacks, __ATOMIC_RELAXED))
			return true;
	return false;
}

/* The request has been abandoned or, with `only_report`, threads keep waiting. */
static void give_up(struct uffd_engine *engine, struct uffd_request *copy, int error,
		    bool only_report)
{
	if (!only_report) {
		clean_up(engine, copy, error, UFFD_FAILED_STALLED);
		return;
	}
	note_failed_offset(engine, copy, copy->is_fault ? copy->fault_offset : copy->offset, error,
			   UFFD_FAILED_STALLED);
	say_engine_fails(engine, copy->address, error, UFFD_FAILED_STALLED,
			 "threads that touch it keep waiting");
}

/* A request without an answer, when its time is up, and the error that it then ends with. */
struct stalled {
	struct uffd_request *request;
	uint64_t due_ns;
	int error;
	struct request_list *list;
};

/* With the requests' lock held: the first whose time is up. */
static struct stalled first_stalled(struct uffd_engine *engine)
{
	struct request_list *lists[] = { &engine->taken, &engine->queued, &engine->promised };
	struct stalled first = { .due_ns = UINT64_MAX };

	for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++) {
		struct stalled next = {
			.request = find_oldest(engine, lists[i]),
			.due_ns = engine->options.stall_limit_ns,
			.error = -ETIMEDOUT,
			.list = lists[i],
		};

		if (!next.request)
			continue;
		/* No source is at fault: the worker gives its own page up within this limit. */
		if (lists[i] == &engine->queued && any_lacks_memory(engine)) {
			next.due_ns = higher(next.due_ns, engine->options.retry_limit_ns);
			next.error = -EBUSY;
		}
		next.due_ns += waited_since(engine, next.request);
		if (next.due_ns < first.due_ns)
			first = next;
	}
	return first;
}

uint64_t fail_stalled_requests(struct uffd_engine *engine)
{
	uint64_t now = uffd_now_ns();
	bool only_report = engine->options.on_error == UFFD_ON_ERROR_STALL;

	if (!engine->options.stall_limit_ns || !atomic_load(&engine->outstanding))
		return UINT64_MAX;
	if (is_paused(engine))
		return atomic_load(&engine->pause.until_ns);
	/* A promised page may have been dropped. */
	settle_promises(engine);
	for (;;) {
		struct uffd_request copy;
		struct stalled stalled;

		pthread_mutex_lock(&engine->requests_lock);
		stalled = first_stalled(engine);
		if (now < stalled.due_ns) {
			pthread_mutex_unlock(&engine->requests_lock);
			return stalled.due_ns;
		}
		copy_request(&copy, stalled.request);
		if (only_report)
			stalled.request->reported = 1;
		else
			abandon(engine, stalled.list, stalled.request, &copy);
		pthread_mutex_unlock(&engine->requests_lock);

		count(engine, COUNTER(stalled_requests), 1);
		if (stalled.error == -ETIMEDOUT)
			show_tracebacks(engine);
		give_up(engine, &copy, stalled.error, only_report);
	}
}

/* With the requests' lock held: what a thread's source is asked for; NULL: it runs none. */
static struct uffd_request *fetched_by(struct uffd_engine *engine, uint32_t thread_id)
{
	struct uffd_request *request;

	TAILQ_FOREACH(request, &engine->taken, link)
		if (request->worker_id == thread_id &&
		    !__atomic_load_n(&request->answered, __ATOMIC_ACQUIRE))
			return request;
	return NULL;
}

static bool asks_for(const struct uffd_request *request, const struct uffd_range *range,
		     uint64_t page)
{
	return request->id == range->id &&
	       content_offset(range, page) - request->offset < request->length;
}

void end_own_wait(struct uffd_range *range, uint64_t page, uint32_t thread_id)
{
	struct uffd_engine *engine = range->space->engine;
	bool only_report = engine->options.on_error == UFFD_ON_ERROR_STALL;
	bool is_only = engine->options.has_workers == 1, is_new = false;
	uint8_t absent = UFFD_PAGE_ABSENT;
	struct uffd_request *request, copy;

	pthread_mutex_lock(&engine->requests_lock);
	request = fetched_by(engine, thread_id);
	if (!request || !needs_request(range, page) || !(is_only || asks_for(request, range, page))) {
		pthread_mutex_unlock(&engine->requests_lock);
		return;
	}
	copy_request(&copy, request);
	is_new = !request->abandoned && !request->reported;
	if (only_report)
		request->reported = 1;
	else if (is_new)
		abandon(engine, &engine->taken, request, &copy);
	pthread_mutex_unlock(&engine->requests_lock);

	if (is_new) {
		count(engine, COUNTER(stalled_requests), 1);
		show_tracebacks(engine);
		give_up(engine, &copy, -EDEADLK, only_report);
	}
	/* Nobody else could fetch this one either. */
	if (!only_report && is_only &&
	    atomic_compare_exchange_strong(state_of(range, page), &absent, UFFD_PAGE_IN_FLIGHT))
		apply_on_error(range, page, -EDEADLK, UFFD_FAILED_STALLED, thread_id);
}
