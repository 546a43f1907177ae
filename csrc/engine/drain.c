// SPDX-License-Identifier: MIT
/*
 * Waiting for the faults that wait at one instant.
 *
 * A message does not say how long its thread has waited.  But one read returns all that
 * is queued, so after a whole step of the leader each of these faults has been resolved,
 * deferred or requested.  What is deferred or requested by then is waited for; what comes
 * later is not, since busy threads ask for pages without end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>

#include "drain.h"
#include "base/clock.h"

#define CHECK_NS	200000
/* The first step may have begun before the call. */
#define PASSES		2
/*
 * A page that was requested along with another may become absent again; its waiters then
 * fault again.  Wait for them at most this often.
 */
#define ROUNDS		4

void note_pass(struct uffd_engine *engine)
{
	const struct fault_list *list = &engine->deferred;
	uint64_t oldest = UINT64_MAX;

	for (size_t i = 0; i < list->count; i++)
		if (list->faults[i].read_ns < oldest)
			oldest = list->faults[i].read_ns;
	atomic_store(&engine->deferred_since_ns, oldest);
	atomic_fetch_add(&engine->passes, 1);
}

static bool any_before(const struct request_list *list, uint64_t ns)
{
	const struct uffd_request *request;

	TAILQ_FOREACH(request, list, link)
		if (!request->abandoned && request->since_ns <= ns)
			return true;
	return false;
}

/* Whether nothing that was read before this time is left. */
static bool is_drained(struct uffd_engine *engine, uint64_t ns)
{
	bool found = atomic_load(&engine->deferred_since_ns) <= ns;

	if (found || !atomic_load(&engine->outstanding))
		return !found;
	pthread_mutex_lock(&engine->requests_lock);
	found = any_before(&engine->queued, ns) || any_before(&engine->taken, ns) ||
		any_before(&engine->promised, ns);
	pthread_mutex_unlock(&engine->requests_lock);
	return !found;
}

/* Returns false if the time is up. */
static bool pause_until(struct uffd_engine *engine, uint64_t give_up)
{
	struct timespec pause = { .tv_nsec = CHECK_NS };

	if (uffd_now_ns() >= give_up || atomic_load(&engine->end.hurried))
		return false;
	kick_leader(engine);
	nanosleep(&pause, NULL);
	return true;
}

static bool drain_once(struct uffd_engine *engine, uint64_t give_up)
{
	/* One step reads some of many descriptors, in turn. */
	uint64_t turns = PASSES * (1 + atomic_load(&engine->space_count) / SPACES_AT_ONCE);
	uint64_t enough = atomic_load(&engine->passes) + turns, read_ns;

	while (atomic_load(&engine->passes) < enough)
		if (!pause_until(engine, give_up))
			return false;
	read_ns = uffd_now_ns();
	atomic_store(&engine->drained_ns, read_ns);
	while (!is_drained(engine, read_ns))
		if (!pause_until(engine, give_up))
			return false;
	return true;
}

int uffd_native_drain(struct uffd_engine *engine, uint64_t limit_ns)
{
	uint64_t give_up = uffd_now_ns() + limit_ns, given_back;

	if (!engine->thread_running)
		return 0;
	atomic_store(&engine->drained_ns, uffd_now_ns());
	for (unsigned int round = 0; round < ROUNDS; round++) {
		given_back = atomic_load(&engine->given_back);
		if (!drain_once(engine, give_up))
			return -ETIMEDOUT;
		if (given_back == atomic_load(&engine->given_back))
			break;
	}
	return 0;
}
