// SPDX-License-Identifier: MIT
/*
 * A worker's answer: content, to be put in place as far as it is still wanted, or an
 * error.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "alloc.h"
#include "answer.h"
#include "barrier.h"
#include "failures.h"
#include "fill.h"
#include "gate.h"
#include "left.h"
#include "pause.h"
#include "put.h"
#include "queue.h"
#include "range.h"
#include "resolve.h"
#include "space.h"
#include "stats.h"
#include "base/clock.h"

static void drop_request(struct uffd_engine *engine, struct uffd_request *request,
			 uint64_t filled, int error)
{
	pthread_mutex_lock(&engine->requests_lock);
	populate_answered(engine, request, filled, error);
	TAILQ_REMOVE(&engine->taken, request, link);
	/* An abandoned request is no longer counted. */
	if (!request->abandoned)
		atomic_fetch_sub(&engine->outstanding, 1);
	pthread_mutex_unlock(&engine->requests_lock);
	uffd_free(request);
}

/* Others may fill a requested page as well (uffd_engine_fill), or give it up. */
static bool claim_requested(struct uffd_range *range, uint64_t page)
{
	uint8_t expected = UFFD_PAGE_REQUESTED;

	return atomic_compare_exchange_strong(state_of(range, page), &expected,
					      UFFD_PAGE_IN_FLIGHT);
}

/* The answer could not be put in place: its pages wait for another attempt. */
static void give_back(struct uffd_range *range, uint64_t at, uint64_t end)
{
	for (; at < end; at += range->page_size) {
		uint8_t expected = UFFD_PAGE_IN_FLIGHT;

		/* Unless they were poisoned meanwhile. */
		atomic_compare_exchange_strong(state_of(range, at), &expected,
					       UFFD_PAGE_REQUESTED);
	}
}

/*
 * Put a run of pages that still wait for the request, at most *most bytes; the gate is held
 * for one run.  A page that was dropped is skipped, whatever its state is now: it is zeros.
 *
 * A page that is not registered any more is skipped alone, since what lies behind it may be
 * what a thread waits for.
 */
static int put_answer(struct uffd_engine *engine, const struct uffd_request *request,
		      uint64_t *offset, const char *data, uint64_t *most, uint64_t *filled)
{
	struct uffd_space *space = space_get(engine, request->space);
	uint64_t end = request->offset + request->length, at, stop, past;
	struct uffd_fill_result result;
	uint64_t before = atomic_load(&engine->turned_away);
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
		/* This page is no longer mapped; the next one may be. */
		*offset += request->page_size;
		goto out;
	}
	at = range->start + (*offset - range->origin);
	stop = at;
	while (stop < range->end && content_offset(range, stop) < end && stop - at < *most &&
	       claim_requested(range, stop)) {
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
	    (request->is_fault ? lacks_huge_page(range, at, request->since_ns)
			       : is_lacking(range, at))) {
		r = -ENOMEM;
		give_back(range, at, stop);
		goto out;
	}
	past = at + result.done + result.already_present;
	set_filled(range, at, past, &result);
	/* That a huge page is there wakes nobody, see fill_of(). */
	if (is_huge(range) && result.already_present)
		wake_again(range, at, past);
	else
		wake_turned_away(range, at, past, before);
	wake_left(range, at, past);
	count(engine, COUNTER(filled_pages), result.done >> range->page_shift);
	*filled += result.done;
	*offset += past - at;
	if (r == 0 && result.deferred)
		r = -EAGAIN;
	if (r == -ESRCH)
		atomic_store(&space->gone, true);
	if (r == -ESRCH) {
		unclaim(range, past, stop, UFFD_PAGE_ABSENT);
	} else if (r == -ENOENT) {
		/* Its event may be unread: unclaim it, in case it is requested again. */
		unclaim(range, past, past + range->page_size, UFFD_PAGE_ABSENT);
		give_back(range, past + range->page_size, stop);
		*offset += range->page_size;
		*most = range->page_size;
	} else {
		give_back(range, past, stop);
		if (*most < request->length)
			*most *= 2;
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
		note_failed_page(range, page, error, UFFD_FAILED_STALLED);
	poison_page(range, page);
}

/*
 * Apply on_error to the page that a thread touched.  Its neighbours become absent again,
 * and so do populate's pages: a thread that touches one causes a new request.
 */
static void give_up_page(const struct uffd_request *request, struct uffd_range *range,
			 uint64_t page, int error, enum uffd_failure_stage stage)
{
	if (!claim_requested(range, page))
		return;
	if (stage == UFFD_FAILED_NOTHING) {
		abandon_page(range, page, error);
	} else if (request->is_fault && content_offset(range, page) == request->fault_offset) {
		apply_on_error(range, page, error, stage, request->thread_id);
	} else {
		if (!request->is_fault)
			note_failed_page(range, page, error, stage);
		unclaim(range, page, page + range->page_size, UFFD_PAGE_ABSENT);
		atomic_fetch_add(&range->space->engine->given_back, 1);
	}
}

/* Nobody answers for these pages any more: `again`, or give them up. */
static void end_pages(struct uffd_engine *engine, const struct uffd_request *request,
		      uint64_t offset, uint64_t end, bool again, int error,
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
		if (range) {
			uint64_t page = range->start + (offset - range->origin);

			if (!again)
				give_up_page(request, range, page, error, stage);
			else if (claim_requested(range, page))
				unclaim(range, page, page + range->page_size, UFFD_PAGE_ABSENT);
			wake_left(range, page, page + range->page_size);
		}
		uffd_table_leave(space->table, shard);
		gate_leave(space);
	}
	end_work(engine, phase);
	space_put(space);
}

void give_up_pages(struct uffd_engine *engine, const struct uffd_request *request,
		   uint64_t offset, uint64_t end, int error, enum uffd_failure_stage stage)
{
	end_pages(engine, request, offset, end, false, error, stage);
}

void return_pages(struct uffd_engine *engine, const struct uffd_request *request)
{
	end_pages(engine, request, request->offset, request->offset + request->length, true, 0,
		  UFFD_FAILED_NOTHING);
}

/* How long to retry pages that cannot be put in place; no thread waits for populate's pages. */
static uint64_t patience_with(const struct uffd_engine *engine, const struct uffd_request *request)
{
	uint64_t limit = engine->options.stall_limit_ns;

	if (request->is_fault || !limit)
		return engine->options.retry_limit_ns;
	return lower(engine->options.retry_limit_ns, limit / 2);
}

/* Note why the worker retries, for whatever waits behind it; 0: it no longer does. */
static void note_lack(struct uffd_request *request, int error)
{
	__atomic_store_n(&request->lacks, error, __ATOMIC_RELAXED);
}

int answer_request(struct uffd_engine *engine, struct uffd_request *request, const void *data)
{
	uint64_t offset = request->offset, end = request->offset + request->length;
	uint64_t give_up = 0, filled = 0, most = request->length;
	unsigned int attempt = 0;
	uint32_t phase;
	int r = 0;

	uffd_barrier(UFFD_BARRIER_COMPLETE);
	/* From now on the source cannot be called stalled. */
	__atomic_store_n(&request->answered, 1, __ATOMIC_RELEASE);
	phase = begin_work(engine);
	while (is_paused(engine)) {
		end_work(engine, phase);
		await_resumption(engine);
		phase = begin_work(engine);
	}
	while (offset < end && !__atomic_load_n(&request->abandoned, __ATOMIC_ACQUIRE)) {
		r = put_answer(engine, request, &offset, data, &most, &filled);
		if (r == 0) {
			if (attempt)
				note_lack(request, 0);
			attempt = 0;
			continue;
		}
		if (r != -EAGAIN && r != -ENOMEM)
			break;
		if (attempt == 0) {
			give_up = uffd_now_ns() + patience_with(engine, request);
			note_lack(request, r);
		} else if (uffd_now_ns() > give_up) {
			break;
		}
		count(engine, COUNTER(retried), attempt == 0);
		uffd_back_off(attempt++);
	}
	if (r && r != -ESRCH)
		give_up_pages(engine, request, offset, end, r, UFFD_FAILED_RESOLVE);
	/* The page for populate to report. */
	if (r)
		request->address += offset - request->offset;
	if (__atomic_load_n(&request->abandoned, __ATOMIC_ACQUIRE))
		r = -ECANCELED;
	else if (r == 0 && request->is_fault)
		note_fault(engine, request->space, request->fault_address, request->flags,
			   request->thread_id, request->since_ns);
	drop_request(engine, request, filled, r);
	end_work(engine, phase);
	return r;
}

int uffd_engine_complete(struct uffd_engine *engine, struct uffd_request *request,
			 const void *data)
{
	/* The data may be memory of any kind, even memory that faults. */
	uffd_fault_in((uint64_t)(uintptr_t)data, request->length, false);
	return answer_request(engine, request, data);
}

/* With the requests' lock held; `first` is taken, `second` is new or NULL. */
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
		/* The source fails with many pages at once: request single ones from now on. */
		populate->chunk = populate->limit = first->page_size;
	}
	/* The caller takes the first itself. */
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
	/* A populate that has failed already must not wait for more. */
	again = !request->abandoned && !(request->populate && request->populate->error);
	copy_request(&before, request);
	if (again && second) {
		request->length = request->length / 2 & ~(request->page_size - 1);
		copy_request(second, request);
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
