// SPDX-License-Identifier: MIT
/*
 * Pages whose content somebody else must fetch, and the workers that do it.
 *
 * A worker that has nothing to do leads: it runs the engine's loop itself, so a
 * request needs no hand-over.  When it leaves with one, another idle worker takes
 * the lead; when there is none, a timer lets the engine's own thread do it, so
 * that faults which need no worker never wait for one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "alloc.h"
#include "core.h"

/* How long nobody may lead: far longer than a quick worker needs, far shorter than a fault may wait. */
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
	TAILQ_INSERT_TAIL(&engine->queued, request, link);
	atomic_fetch_add(&engine->outstanding, 1);
	if (populate) {
		populate->queued++;
		populate->outstanding++;
	}
	/* A worker that leads takes the first one itself; populate asks from another thread. */
	if (atomic_fetch_add(&engine->queued_count, 1) == 0 && engine->leader == LEADER_WORKER) {
		if (!pthread_equal(engine->leader_thread, pthread_self()))
			kick_leader(engine);
	} else if (engine->idle_workers) {
		pthread_cond_signal(&engine->requests_changed);
	}
	pthread_mutex_unlock(&engine->requests_lock);
	return true;
}

/* Nobody leads and the caller is about to be busy. */
static void pass_the_lead(struct uffd_engine *engine)
{
	if (engine->leader != LEADER_NONE)
		return;
	if (engine->idle_workers) {
		pthread_cond_signal(&engine->requests_changed);
	} else {
		/* Setting a timer costs more than all the rest here: one that runs will do. */
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
			lead(engine, LEADER_WORKER);
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

static void drop_request(struct uffd_engine *engine, struct uffd_request *request,
			 uint64_t filled, int error)
{
	pthread_mutex_lock(&engine->requests_lock);
	populate_answered(engine, request, filled, error);
	TAILQ_REMOVE(&engine->taken, request, link);
	/* Nobody waits for one that was abandoned; it is counted no more. */
	if (!request->abandoned)
		atomic_fetch_sub(&engine->outstanding, 1);
	pthread_mutex_unlock(&engine->requests_lock);
	uffd_free(request);
}

/*
 * Pages of the request that still wait for it get the bytes; one gate's length.
 * One that was dropped does not, whoever is at it now: it is zeros.
 */
static int put_answer(struct uffd_engine *engine, const struct uffd_request *request,
		      uint64_t *offset, const char *data, uint64_t *filled)
{
	struct uffd_space *space = space_get(engine, request->space);
	uint64_t end = request->offset + request->length, at, stop, past;
	struct uffd_fill_result result;
	struct uffd_hold *hold = NULL;
	struct uffd_range *range;
	unsigned int shard;
	int r = 0;

	if (!space)
		return -ESRCH;
	gate_enter(space);
	shard = uffd_table_enter(space->table, current_cpu());
	range = find_piece(space, request->id, *offset,
			   request->address + (*offset - request->offset));
	if (!range) {
		/* This page is mapped no more; the next one may be. */
		*offset += request->page_size;
		goto out;
	}
	at = range->start + (*offset - range->origin);
	stop = at;
	while (stop < range->end && content_offset(range, stop) < end &&
	       atomic_load(state_of(range, stop)) == UFFD_PAGE_REQUESTED) {
		stop += range->page_size;
		if (is_huge(range))
			break;
	}
	if (stop == at) {
		*offset += range->page_size;
		goto out;
	}
	hold = leave_with(space->table, shard, range, at, stop, request->worker_id);
	r = put_bytes(range, at, stop - at,
		      (uint64_t)(uintptr_t)(data + (*offset - request->offset)), FILL_AHEAD,
		      &result);
	uffd_barrier(UFFD_BARRIER_PLACED);
	if (r == 0 && result.already_present &&
	    lacks_huge_page(range, at, request->since_ns)) {
		r = -ENOMEM;
		goto out;
	}
	past = at + result.done + result.already_present;
	set_filled(range, at, past, &result);
	wake_again(range, at, past);
	count(engine, COUNTER(filled_pages), result.done >> range->page_shift);
	*filled += result.done;
	*offset += past - at;
	if (r == 0 && result.deferred)
		r = -EAGAIN;
	if (r == -ESRCH)
		atomic_store(&space->gone, true);
	if (r == -ENOENT || r == -ESRCH) {
		/* Gone, and its event unread; should it be asked for again, nobody is at it. */
		unclaim(range, past, stop, UFFD_PAGE_ABSENT);
		*offset += stop - past;
	}
out:
	let_go(space->table, shard, hold);
	gate_leave(space);
	space_put(space);
	return r == -ENOENT ? 0 : r;
}

static void abandon_page(struct uffd_range *range, uint64_t page, int error)
{
	if (error)
		note_failure(range->space->engine, page, range->page_size, error,
			     UFFD_FAILED_STALLED);
	poison_page(range, page);
}

/*
 * on_error for the page that a thread touched; its neighbours are absent again, and so
 * is what populate asked for: whoever touches it asks for it by itself.
 */
static void give_up_page(const struct uffd_request *request, struct uffd_range *range,
			 uint64_t page, int error, enum uffd_failure_stage stage)
{
	if (atomic_load(state_of(range, page)) != UFFD_PAGE_REQUESTED)
		return;
	if (stage == UFFD_FAILED_NOTHING) {
		abandon_page(range, page, error);
	} else if (request->is_fault && content_offset(range, page) == request->fault_offset) {
		apply_on_error(range, page, error, stage, request->thread_id);
	} else {
		if (!request->is_fault)
			note_failure(range->space->engine, page, range->page_size, error, stage);
		unclaim(range, page, page + range->page_size, UFFD_PAGE_ABSENT);
	}
}

/* The pages of [offset, end) that still wait; FAILED_NOTHING poisons them all. */
static void give_up_pages(struct uffd_engine *engine, const struct uffd_request *request,
			  uint64_t offset, uint64_t end, int error,
			  enum uffd_failure_stage stage)
{
	struct uffd_space *space = space_get(engine, request->space);
	uint64_t step = request->page_size;
	uint32_t phase;

	if (!space)
		return;
	phase = begin_work(engine);
	for (; offset < end; offset += step) {
		unsigned int shard;
		struct uffd_range *range;

		gate_enter(space);
		shard = uffd_table_enter(space->table, current_cpu());
		range = find_piece(space, request->id, offset,
				   request->address + (offset - request->offset));
		if (range)
			give_up_page(request, range, range->start + (offset - range->origin),
				     error, stage);
		uffd_table_leave(space->table, shard);
		gate_leave(space);
	}
	end_work(engine, phase);
	space_put(space);
}

static int complete(struct uffd_engine *engine, struct uffd_request *request, const void *data)
{
	uint64_t offset = request->offset, end = request->offset + request->length;
	uint64_t give_up = 0, filled = 0;
	unsigned int attempt = 0;
	uint32_t phase;
	int r = 0;

	uffd_barrier(UFFD_BARRIER_COMPLETE);
	phase = begin_work(engine);
	while (offset < end && !__atomic_load_n(&request->abandoned, __ATOMIC_ACQUIRE)) {
		r = put_answer(engine, request, &offset, data, &filled);
		if (r == 0) {
			attempt = 0;
			continue;
		}
		if (r != -EAGAIN && r != -ENOMEM)
			break;
		if (attempt == 0)
			give_up = uffd_now_ns() + engine->options.retry_limit_ns;
		else if (uffd_now_ns() > give_up)
			break;
		count(engine, COUNTER(retried), attempt == 0);
		uffd_back_off(attempt++);
	}
	if (r && r != -ESRCH)
		give_up_pages(engine, request, offset, end, r, UFFD_FAILED_RESOLVE);
	if (__atomic_load_n(&request->abandoned, __ATOMIC_ACQUIRE))
		r = -ECANCELED;
	else if (r == 0 && request->is_fault)
		note_fault(engine, request->fault_address, request->flags, request->thread_id,
			   request->since_ns);
	drop_request(engine, request, filled, r);
	end_work(engine, phase);
	return r;
}

int uffd_engine_complete(struct uffd_engine *engine, struct uffd_request *request,
			 const void *data)
{
	/* It may be memory of any kind. */
	uffd_fault_in((uint64_t)(uintptr_t)data, request->length, false);
	return complete(engine, request, data);
}

struct uffd_request *uffd_engine_complete_next(struct uffd_engine *engine,
					       struct uffd_request *request, const void *data)
{
	complete(engine, request, data);
	return uffd_engine_next_request(engine);
}

/* With the requests' lock held; `first` is taken, `second` new or NULL. */
static void queue_again(struct uffd_engine *engine, struct uffd_request *first,
			struct uffd_request *second)
{
	struct populate *populate = first->populate;

	TAILQ_REMOVE(&engine->taken, first, link);
	TAILQ_INSERT_HEAD(&engine->queued, first, link);
	if (second)
		TAILQ_INSERT_AFTER(&engine->queued, first, second, link);
	atomic_fetch_add(&engine->queued_count, second ? 2 : 1);
	atomic_fetch_add(&engine->outstanding, second ? 1 : 0);
	first->taken_ns = 0;
	if (second)
		second->taken_ns = 0;
	if (populate) {
		populate->queued += second ? 2 : 1;
		populate->outstanding += second ? 1 : 0;
		/* It has trouble with many at once, so no more of that. */
		populate->chunk = populate->limit = first->page_size;
	}
	/* The caller comes for the first itself. */
	if (second && engine->idle_workers)
		pthread_cond_signal(&engine->requests_changed);
}

int uffd_engine_ask_again(struct uffd_engine *engine, struct uffd_request *request)
{
	struct uffd_request before, *second = NULL;
	bool again;

	if (request->length == request->page_size)
		return 0;
	if (!request->is_fault) {
		second = uffd_alloc(sizeof(*second));
		if (!second)
			return 0;
	}
	pthread_mutex_lock(&engine->requests_lock);
	/* Populate that has failed already is not to wait for more of it. */
	again = !request->abandoned && !(request->populate && request->populate->error);
	before = *request;
	if (again && second) {
		request->length = request->length / 2 & ~(request->page_size - 1);
		*second = *request;
		second->offset += request->length;
		second->address += request->length;
		second->length = before.length - request->length;
	} else if (again) {
		request->offset = request->fault_offset;
		request->address += request->fault_offset - before.offset;
		request->length = request->page_size;
	}
	if (again)
		queue_again(engine, request, second);
	pthread_mutex_unlock(&engine->requests_lock);
	if (!again)
		uffd_free(second);
	if (again && !second) {
		give_up_pages(engine, &before, before.offset, before.fault_offset, 0,
			      UFFD_FAILED_SOURCE);
		give_up_pages(engine, &before, before.fault_offset + before.page_size,
			      before.offset + before.length, 0, UFFD_FAILED_SOURCE);
	}
	return again;
}

int uffd_engine_fail(struct uffd_engine *engine, struct uffd_request *request, int32_t error)
{
	int r = __atomic_load_n(&request->abandoned, __ATOMIC_ACQUIRE) ? -ECANCELED : 0;

	if (r == 0)
		give_up_pages(engine, request, request->offset, request->offset + request->length,
			      -error, UFFD_FAILED_SOURCE);
	drop_request(engine, request, 0, r ? r : -EIO);
	return r;
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
}

/* With the requests' lock held: its answer comes too late from now on. */
static void abandon(struct uffd_request *request, struct uffd_request *copy_ret, bool is_queued)
{
	__atomic_store_n(&request->abandoned, 1, __ATOMIC_RELEASE);
	*copy_ret = *request;
	request->populate = NULL;
	if (is_queued && copy_ret->populate)
		copy_ret->populate->queued--;
}

/* What is due for an abandoned request, which may be freed by now, hence the copy. */
static void forget(struct uffd_engine *engine, struct uffd_request *copy, int error,
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
	struct request_list *lists[] = { &engine->queued, &engine->taken };
	struct uffd_request *request, copy;

	for (size_t i = 0; i < 2; i++) {
		do {
			pthread_mutex_lock(&engine->requests_lock);
			TAILQ_FOREACH(request, lists[i], link)
				if (!request->abandoned && (!id || request->id == id))
					break;
			if (request)
				abandon(request, &copy, i == 0);
			pthread_mutex_unlock(&engine->requests_lock);
			if (request)
				forget(engine, &copy, -error, UFFD_FAILED_NOTHING);
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

/* Python's own dump of all tracebacks hangs on this signal (faulthandler.register). */
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
 * Since when the source is waited for.  A thread waits from its fault on.  For populate
 * it is the worker's time that counts: as long as workers come for requests, those
 * that are queued behind are in nobody's hand.
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

static void find_oldest(const struct uffd_engine *engine, struct request_list *list,
			struct uffd_request **oldest)
{
	struct uffd_request *request;

	TAILQ_FOREACH(request, list, link)
		if (!request->abandoned && !request->reported &&
		    (!*oldest || waited_since(engine, request) < waited_since(engine, *oldest)))
			*oldest = request;
}

uint64_t fail_stalled_requests(struct uffd_engine *engine)
{
	uint64_t limit = engine->options.stall_limit_ns, now = uffd_now_ns();
	bool only_report = engine->options.on_error == UFFD_ON_ERROR_STALL;

	if (!limit || !atomic_load(&engine->outstanding))
		return UINT64_MAX;
	for (;;) {
		struct uffd_request *request = NULL, *taken, copy;
		uint64_t since;

		pthread_mutex_lock(&engine->requests_lock);
		find_oldest(engine, &engine->taken, &request);
		taken = request;
		find_oldest(engine, &engine->queued, &request);
		since = request ? waited_since(engine, request) : 0;
		/* A worker may have come for it since we looked at the clock. */
		if (!request || now < since || now - since < limit) {
			pthread_mutex_unlock(&engine->requests_lock);
			return request ? since + limit : UINT64_MAX;
		}
		copy = *request;
		if (only_report)
			request->reported = 1;
		else
			abandon(request, &copy, request != taken);
		pthread_mutex_unlock(&engine->requests_lock);

		count(engine, COUNTER(stalled_requests), 1);
		show_tracebacks(engine);
		if (only_report) {
			note_failure(engine, copy.address, copy.length, -ETIMEDOUT,
				     UFFD_FAILED_STALLED);
			say_engine_fails(engine, copy.address, -ETIMEDOUT, UFFD_FAILED_STALLED,
					 "whoever touches it waits on");
			continue;
		}
		forget(engine, &copy, -ETIMEDOUT, UFFD_FAILED_STALLED);
	}
}
