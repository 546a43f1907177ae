// SPDX-License-Identifier: MIT
/*
 * The end of an engine, from one thread.
 *
 * First the leader must stop.  A leader that a source blocks is dismissed: when it
 * returns it touches nothing of the leader's.  From then on this thread leads, so that
 * layout events are read and faults are answered with poison while ranges are sealed
 * and taken out.  This thread reads no source unless a range needs it, and waits only
 * for other threads; all these waits together have a limit.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "end.h"
#include "native.h"
#include "patience.h"
#include "serve.h"
#include "slices.h"
#include "space.h"
#include "stall.h"
#include "stray.h"
#include "unserve.h"
#include "base/clock.h"

/* A leader that is not blocked in a source notices within this time that it must stop. */
#define LEAVE_LIMIT_NS	5000000000

static bool worker_leads(struct uffd_engine *engine)
{
	bool leads;

	pthread_mutex_lock(&engine->requests_lock);
	leads = engine->leader == LEADER_WORKER;
	pthread_mutex_unlock(&engine->requests_lock);
	return leads;
}

static bool dismiss(struct uffd_engine *engine)
{
	uint32_t held_up = LEAD_HELD_UP;

	return atomic_compare_exchange_strong(&engine->lead_state, &held_up, LEAD_DISMISSED);
}

/* Make the leader stop; returns whether there is no other leader now. */
static bool end_leader(struct uffd_engine *engine, struct patience *patience)
{
	uint64_t began = uffd_now_ns();

	native_end(engine);
	while (!atomic_load(&engine->thread_done) || worker_leads(engine)) {
		if (wait_on(patience))
			continue;
		if (is_dismissed(engine) || dismiss(engine)) {
			/*
			 * The dismissed leader was the native thread; or it was a worker,
			 * and that thread has ended.
			 */
			if (!worker_leads(engine) || atomic_load(&engine->thread_done))
				return true;
		} else if (uffd_now_ns() - began > LEAVE_LIMIT_NS) {
			return false;
		}
	}
	return true;
}

static void take_over(struct uffd_engine *engine)
{
	engine->end.leads = true;
	engine->leader_id = (uint32_t)syscall(SYS_gettid);
	engine->job_count = 0;
}

/* Join the native thread if it has ended; returns whether there is none now. */
static bool join_thread(struct uffd_engine *engine)
{
	if (!atomic_load(&engine->thread_running))
		return true;
	if (!atomic_load_explicit(&engine->thread_done, memory_order_acquire))
		return false;
	pthread_join(engine->thread, NULL);
	atomic_store(&engine->thread_running, false);
	return true;
}

/* Ranges that need the user's memory, or a source, come last: they may block us. */
static bool comes_last(const struct uffd_range *range)
{
	return range->content->preserve ||
	       (loses_content(range) && !has_ioctl(range, _UFFDIO_POISON));
}

struct target {
	struct uffd_range_ref ref;
	uint64_t end;
};

/* The next range that ends behind *at. */
static bool next_range(struct uffd_engine *engine, uint32_t number, bool last, uint64_t at,
		       struct target *target)
{
	struct uffd_range *range;
	struct access access;

	if (!open_access(engine, number, &access))
		return false;
	for (range = uffd_table_next(access.space->table, at); range;
	     range = uffd_table_next(access.space->table, range->end))
		if (range->space == access.space && !range->stays && comes_last(range) == last)
			break;
	if (range)
		*target = (struct target){ { number, range->id, range->start }, range->end };
	close_access(&access);
	return range;
}

/* Take out all ranges of one kind; returns whether there were any. */
static bool take_out_all(struct uffd_engine *engine, bool last, struct patience *patience)
{
	uint32_t spaces = atomic_load(&engine->next_space);
	struct target target;
	bool found = false;

	for (uint32_t number = 0; number < spaces; number++)
		for (uint64_t at = 0; next_range(engine, number, last, at, &target);
		     at = target.end) {
			found = true;
			unserve_in(engine, &target.ref,
				   UFFD_UNSERVE_SEAL | UFFD_UNSERVE_UNREGISTER, patience);
			rest(patience);
		}
	return found;
}

/* Read pending events: a thread that waits for one would wait until the descriptor is closed. */
static void settle(struct uffd_engine *engine, struct patience *patience)
{
	uint32_t spaces = atomic_load(&engine->next_space);

	for (uint32_t number = 0; number < spaces; number++) {
		struct uffd_space *space = space_get(engine, number);

		if (!space)
			continue;
		while (layout_is_changing(space) && wait_on(patience))
			;
		space_put(space);
	}
}

static bool any_stays(struct uffd_engine *engine)
{
	struct uffd_space *space;
	struct uffd_range *range;
	bool stays = false;

	pthread_mutex_lock(&engine->spaces_lock);
	LIST_FOREACH(space, &engine->spaces, link)
		for (range = uffd_table_next(space->table, 0); range;
		     range = uffd_table_next(space->table, range->end))
			stays |= range->space == space;
	stays |= atomic_load(&engine->vacated) > 0;
	pthread_mutex_unlock(&engine->spaces_lock);
	return stays;
}

static void lose_patience(struct uffd_engine *engine)
{
	int64_t left = atomic_load(&engine->end.patience_ns);
	int64_t most = atomic_load(&engine->end.hurried_patience_ns);

	while (left > most &&
	       !atomic_compare_exchange_weak(&engine->end.patience_ns, &left, most))
		;
}

int uffd_engine_end(struct uffd_engine *engine, uint64_t patience_ns)
{
	struct patience patience = { .engine = engine };

	if (!atomic_load(&engine->end.over)) {
		engine->end.thread = pthread_self();
		atomic_store(&engine->end.patience_ns, (int64_t)patience_ns);
		if (atomic_load(&engine->end.hurried))
			lose_patience(engine);
		atomic_store(&engine->end.began, true);
		uffd_engine_refuse(engine);
		if (engine->options.is_inline)
			;
		else if (!atomic_load(&engine->thread_running) || end_leader(engine, &patience))
			take_over(engine);
		uffd_engine_abandon(engine, 0, 0);
		/* Repeat for pieces that were moved or forked in the meantime. */
		do
			settle_moves(engine, &patience);
		while (take_out_all(engine, false, &patience) ||
		       take_out_all(engine, true, &patience));
		settle(engine, &patience);
		if (engine->end.leads)
			refuse_strays(engine, true);
		join_thread(engine);
		atomic_store(&engine->end.over, true);
	}
	return any_stays(engine) ? -EBUSY : 0;
}

void uffd_engine_hurry(struct uffd_engine *engine, uint64_t patience_ns)
{
	atomic_store(&engine->end.hurried_patience_ns, (int64_t)patience_ns);
	atomic_store(&engine->end.hurried, true);
	lose_patience(engine);
}

uint64_t uffd_engine_progress(struct uffd_engine *engine)
{
	return atomic_load(&engine->end.progress);
}

static size_t list_holds(struct uffd_engine *engine, struct uffd_held *held_ret, size_t capacity)
{
	size_t found = 0;

	for (size_t i = 0; i < UFFD_HOLDS && found < capacity; i++) {
		struct uffd_hold *hold = &engine->holds.all[i];

		if (atomic_load(&hold->range))
			held_ret[found++] = (struct uffd_held){
				.id = atomic_load(&hold->id),
				.start = atomic_load(&hold->start),
				.length = atomic_load(&hold->end) - atomic_load(&hold->start),
				.thread_id = atomic_load(&hold->thread_id),
			};
	}
	return found;
}

uint32_t uffd_engine_held(struct uffd_engine *engine, struct uffd_held *held_ret,
			  uint32_t capacity)
{
	size_t found = list_holds(engine, held_ret, capacity);
	struct uffd_request *request;

	pthread_mutex_lock(&engine->requests_lock);
	TAILQ_FOREACH(request, &engine->taken, link)
		if (found < capacity)
			held_ret[found++] = (struct uffd_held){
				.id = request->id,
				.start = request->address,
				.length = request->length,
				.thread_id = request->worker_id,
				.is_request = true,
			};
	pthread_mutex_unlock(&engine->requests_lock);
	return (uint32_t)found;
}

int uffd_engine_is_deserted(struct uffd_engine *engine)
{
	return !uffd_hold_any(&engine->holds) && join_thread(engine) && free_lost(engine);
}
