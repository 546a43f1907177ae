// SPDX-License-Identifier: MIT
/*
 * Workers, which fetch the content of requested pages.
 *
 * An idle worker leads: it runs the engine's loop itself, so a request needs no
 * hand-over.  When it returns with one, another idle worker becomes the leader; if there
 * is none, a timer makes the engine's own thread lead, so that faults which need no
 * worker never wait for one.
 */
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "answer.h"
#include "barrier.h"
#include "loop.h"
#include "promise.h"
#include "queue.h"
#include "request.h"
#include "base/clock.h"

/* The time without a leader: longer than a quick worker needs, shorter than a fault may wait. */
#define WATCHDOG_NS	200000

static void arm_watchdog(struct uffd_engine *engine, uint64_t ns)
{
	struct itimerspec when = { .it_value.tv_nsec = (long)ns };

	engine->watchdog_armed = true;
	timerfd_settime(engine->watchdog_fd, 0, &when, NULL);
}

bool leads_after_watchdog(struct uffd_engine *engine)
{
	uint64_t idle_ns;

	engine->watchdog_armed = false;
	if (engine->leader != LEADER_NONE || atomic_load(&engine->stop))
		return false;
	idle_ns = uffd_now_ns() - engine->leaderless_since_ns;
	if (idle_ns >= WATCHDOG_NS)
		return true;
	arm_watchdog(engine, WATCHDOG_NS - idle_ns);
	return false;
}

/* The caller is about to be busy: if there is no leader now, find one. */
static void pass_the_lead(struct uffd_engine *engine)
{
	if (engine->leader != LEADER_NONE)
		return;
	if (engine->idle_workers) {
		pthread_cond_signal(&engine->requests_changed);
	} else {
		/* Setting a timer is the costly part: keep one that runs already. */
		engine->leaderless_since_ns = uffd_now_ns();
		if (!engine->watchdog_armed)
			arm_watchdog(engine, WATCHDOG_NS);
	}
}

struct uffd_request *uffd_engine_next_request(struct uffd_engine *engine)
{
	struct uffd_request *request = NULL;

	pthread_mutex_lock(&engine->requests_lock);
	while (!atomic_load(&engine->stop)) {
		request = TAILQ_FIRST(&engine->queued);
		if (request) {
			TAILQ_REMOVE(&engine->queued, request, link);
			TAILQ_INSERT_TAIL(&engine->taken, request, link);
			request->worker_id = (uint32_t)syscall(SYS_gettid);
			atomic_fetch_sub(&engine->queued_count, 1);
			populate_taken(engine, request);
			pass_the_lead(engine);
			break;
		}
		if (engine->leader == LEADER_NONE) {
			engine->leader = LEADER_WORKER;
			engine->leader_thread = pthread_self();
			pthread_mutex_unlock(&engine->requests_lock);
			run_loop(engine, LEADER_WORKER);
			pthread_mutex_lock(&engine->requests_lock);
			engine->leader = LEADER_NONE;
			continue;
		}
		engine->idle_workers++;
		if (engine->leader == LEADER_NATIVE)
			kick_leader(engine);
		pthread_cond_wait(&engine->requests_changed, &engine->requests_lock);
		engine->idle_workers--;
	}
	pthread_mutex_unlock(&engine->requests_lock);
	if (request)
		uffd_barrier(UFFD_BARRIER_REQUEST_TAKEN);
	return request;
}

struct uffd_request *uffd_engine_complete_next(struct uffd_engine *engine,
					       struct uffd_request *request, const void *data)
{
	answer_request(engine, request, data);
	return uffd_engine_next_request(engine);
}

struct uffd_request *uffd_engine_promise_next(struct uffd_engine *engine,
					      struct uffd_request *request)
{
	promise_request(engine, request);
	return uffd_engine_next_request(engine);
}
