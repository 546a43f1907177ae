// SPDX-License-Identifier: MIT
/* Requests without an answer: give them up as they get too old, or all at once. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>

#include "answer.h"
#include "promise.h"
#include "queue.h"
#include "say.h"
#include "stall.h"
#include "stats.h"
#include "base/clock.h"

/* With the requests' lock held: from now on an answer is too late. */
static void abandon(struct uffd_engine *engine, struct request_list *list,
		    struct uffd_request *request, struct uffd_request *copy_ret)
{
	__atomic_store_n(&request->abandoned, 1, __ATOMIC_RELEASE);
	*copy_ret = *request;
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

void uffd_engine_abandon(struct uffd_engine *engine, uint64_t id, int32_t error)
{
	struct request_list *lists[] = { &engine->queued, &engine->taken, &engine->promised };
	struct uffd_request *request, copy;

	for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++) {
		do {
			pthread_mutex_lock(&engine->requests_lock);
			TAILQ_FOREACH(request, lists[i], link)
				if (!request->abandoned && (!id || request->id == id))
					break;
			if (request)
				abandon(engine, lists[i], request, &copy);
			pthread_mutex_unlock(&engine->requests_lock);
			/* Nobody promised to wait for what was asked for since. */
			if (request && copy.since_ns > atomic_load(&engine->drained_ns))
				clean_up(engine, &copy, 0, UFFD_FAILED_NOTHING);
			else if (request)
				clean_up(engine, &copy, -error, UFFD_FAILED_NOTHING);
		} while (request);
	}
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

/* Trigger Python's dump of all tracebacks (faulthandler.register) by its signal. */
static void show_tracebacks(struct uffd_engine *engine)
{
	sigset_t only;

	if (!engine->options.stall_signal)
		return;
	sigemptyset(&only);
	sigaddset(&only, (int)engine->options.stall_signal);
	pthread_kill(pthread_self(), (int)engine->options.stall_signal);
	pthread_sigmask(SIG_UNBLOCK, &only, NULL);
	pthread_sigmask(SIG_BLOCK, &only, NULL);
}

/*
 * Since when the source has been waited for.  A fault's thread waits from its fault on.
 * For populate the worker's time counts: as long as workers keep taking requests, the
 * queued ones are not stalled.
 */
static uint64_t waited_since(const struct uffd_engine *engine, const struct uffd_request *request)
{
	if (request->is_fault)
		return request->since_ns;
	if (request->taken_ns)
		return request->taken_ns;
	return engine->last_taken_ns > request->since_ns ? engine->last_taken_ns
							 : request->since_ns;
}

static struct uffd_request *find_oldest(struct uffd_engine *engine, struct request_list **list_ret)
{
	struct request_list *lists[] = { &engine->taken, &engine->queued, &engine->promised };
	struct uffd_request *request, *oldest = NULL;

	for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++)
		TAILQ_FOREACH(request, lists[i], link) {
			if (request->abandoned || request->reported ||
			    (oldest && waited_since(engine, request) >= waited_since(engine, oldest)))
				continue;
			oldest = request;
			*list_ret = lists[i];
		}
	return oldest;
}

uint64_t fail_stalled_requests(struct uffd_engine *engine)
{
	uint64_t limit = engine->options.stall_limit_ns, now = uffd_now_ns();
	bool only_report = engine->options.on_error == UFFD_ON_ERROR_STALL;

	if (!limit || !atomic_load(&engine->outstanding))
		return UINT64_MAX;
	/* A promised page may have been dropped. */
	settle_promises(engine);
	for (;;) {
		struct uffd_request *request, copy;
		struct request_list *list;
		uint64_t since;

		pthread_mutex_lock(&engine->requests_lock);
		request = find_oldest(engine, &list);
		since = request ? waited_since(engine, request) : 0;
		/* A worker may have taken it since we read the clock. */
		if (!request || now < since || now - since < limit) {
			pthread_mutex_unlock(&engine->requests_lock);
			return request ? since + limit : UINT64_MAX;
		}
		copy = *request;
		if (only_report)
			request->reported = 1;
		else
			abandon(engine, list, request, &copy);
		pthread_mutex_unlock(&engine->requests_lock);

		count(engine, COUNTER(stalled_requests), 1);
		show_tracebacks(engine);
		if (only_report) {
			note_failure(engine, copy.address, copy.length, -ETIMEDOUT,
				     UFFD_FAILED_STALLED);
			say_engine_fails(engine, copy.address, -ETIMEDOUT, UFFD_FAILED_STALLED,
					 "threads that touch it keep waiting");
			continue;
		}
		clean_up(engine, &copy, -ETIMEDOUT, UFFD_FAILED_STALLED);
	}
}
