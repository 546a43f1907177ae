// SPDX-License-Identifier: MIT
/*
 * Filling the absent pages of a range, from here or by workers.
 *
 * Workers fetch a chunk at a time.  A chunk that fails is requested again in halves, and
 * a page that fails alone becomes absent again: the caller gets the error, and no thread
 * waits.  With a chunk of 0 the first request is one page, and requests grow as long as
 * answers are quick: a source that is slow with each page must not get so many at once
 * that it appears stalled.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "from_here.h"
#include "populate.h"
#include "put.h"
#include "queue.h"
#include "range.h"
#include "resolve.h"
#include "slices.h"
#include "base/clock.h"

/* The chunk grows up to this: a request then costs a thousandth of the copying. */
#define PACED_LIMIT		(1u << 20)
/* Requests kept queued, so that no worker waits for us. */
#define BACKLOG			32
/* Search pages in slices, so that faults get in between. */
#define ASK_SLICE		(4u << 20)
/* Ranges of a file that are close to each other are faulted in at once, up to this. */
#define GROUP_LIMIT		(1u << 20)

/* Wait until another request may be queued; returns an error if none may be. */
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

/* Queue the next run of absent pages; if a slice has none, move on behind it. */
static int ask_next(struct uffd_range *range, uint64_t *offset, uint64_t end,
		    struct populate *populate)
{
	uint64_t at = range->start + (*offset - range->origin), limit, stop;
	int r = 0;

	limit = range->end - at < end - *offset ? range->end : at + (end - *offset);
	if (limit - at > ASK_SLICE && ASK_SLICE >= range->page_size)
		limit = at + ASK_SLICE;
	while (at < limit && (atomic_load(state_of(range, at)) != UFFD_PAGE_ABSENT ||
			      !needs_request(range, at)))
		at += range->page_size;
	for (stop = at; stop < limit && stop - at < populate->chunk; stop += range->page_size) {
		uint8_t expected = UFFD_PAGE_ABSENT;

		if (!needs_request(range, stop) ||
		    !atomic_compare_exchange_strong(state_of(range, stop), &expected,
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

static int ask_for_all(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		       uint64_t offset, uint64_t end, struct populate *populate)
{
	int r = 0;

	while (r == 0 && offset < end) {
		struct uffd_range *range = NULL;
		struct access access;

		r = await_turn(engine, populate);
		if (r)
			break;
		if (!open_access(engine, ref->space, &access))
			return -ESRCH;
		if (!atomic_load(&access.space->gone))
			range = find_piece(access.space, ref->id, offset,
					   ref->start + offset);
		if (range)
			r = ask_next(range, &offset, end, populate);
		else
			r = atomic_load(&access.space->gone) ? -ESRCH : -ENOENT;
		close_access(&access);
	}
	return r;
}

/* Wait for the answers; afterwards no request refers to `populate`. */
static int finish(struct uffd_engine *engine, struct populate *populate)
{
	struct request_list *lists[] = { &engine->queued, &engine->taken, &engine->promised };
	struct uffd_request *request;
	int r;

	pthread_mutex_lock(&engine->requests_lock);
	while (populate->outstanding && !atomic_load(&engine->stop))
		pthread_cond_wait(&engine->populates_changed, &engine->requests_lock);
	r = populate->outstanding ? -ECANCELED : populate->error;
	for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++)
		TAILQ_FOREACH(request, lists[i], link)
			if (request->populate == populate)
				request->populate = NULL;
	pthread_mutex_unlock(&engine->requests_lock);
	return r;
}

/* A fault may have requested a page before us. */
static bool has_pages_in_flight(struct uffd_engine *engine, const struct uffd_range_ref *ref,
				uint64_t offset, uint64_t end)
{
	struct uffd_range *range = NULL;
	struct access access;
	bool found = false;

	if (!open_access(engine, ref->space, &access))
		return false;
	range = any_piece(access.space, ref->id, ref->start);
	if (range)
		for (; offset < end && !found; offset += range->page_size)
			found = uffd_page_is_in_flight(
				atomic_load(&range->pages->state[offset >> range->page_shift]));
	close_access(&access);
	return found;
}

static int populate_by_request(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			       uint64_t page_size, uint64_t offset, uint64_t end, uint64_t chunk,
			       struct uffd_populate_result *result)
{
	uint64_t limit = PACED_LIMIT > page_size ? PACED_LIMIT : page_size;
	struct populate populate = {
		.paced = !chunk,
		.chunk = chunk ? chunk : page_size,
		.limit = chunk ? chunk : limit,
	};
	int r = ask_for_all(engine, ref, offset, end, &populate), finished;
	unsigned int attempt = 0;

	finished = finish(engine, &populate);
	result->filled = populate.filled;
	result->failed_at = populate.failed_at;
	while (r == 0 && finished == 0 && atomic_load(&engine->outstanding) &&
	       !atomic_load(&engine->stop) && has_pages_in_flight(engine, ref, offset, end))
		uffd_back_off(attempt++);
	return r ? r : finished;
}

static uint64_t fill_reach(const struct slices *all, struct uffd_range *range, uint64_t at,
			   uint64_t end, struct reach *reach)
{
	const struct uffd_content *content = range->content;
	uint64_t stop = run_of(range, &at, end, UFFD_PAGE_ABSENT);
	uint64_t offset = content_offset(range, at), length = stop - at;

	(void)all;
	if (at >= end)
		return end;
	if (content->writes_cache) {
		reach->write = content->local + offset;
		reach->write_length = length;
	}
	if (content->overlay) {
		reach->overlay_offset = offset;
		reach->overlay_length = length;
	} else if (offset < content->length) {
		reach->read = content->address + offset;
		reach->read_length =
			length < content->length - offset ? length : content->length - offset;
	}
	reach->tail = content->tail && offset + length > content->length;
	return stop;
}

/* The same for whatever is in [at, end), of a file only: reading a little more is harmless. */
static uint64_t group_reach(const struct slices *all, struct uffd_range *range, uint64_t at,
			    uint64_t end, struct reach *reach)
{
	const struct uffd_content *content = range->content;
	uint64_t offset = content_offset(range, at);

	(void)all;
	if (offset < content->length) {
		reach->read = content->address + offset;
		reach->read_length = lower(end - at, content->length - offset);
	}
	return end;
}

/* What filling the absent pages of a range depends on. */
struct needs {
	bool is_filled, by_request, reads_file, is_mixed;
	uint64_t page_size;
	uint32_t thread_id;	/* the caller's */
};

static int look_up(struct uffd_engine *engine, const struct uffd_range_ref *ref, struct needs *ret)
{
	struct uffd_range *range;
	struct access access;

	if (!open_access(engine, ref->space, &access))
		return -ESRCH;
	range = any_piece(access.space, ref->id, ref->start);
	if (range)
		*ret = (struct needs){
			can_be_absent(range),
			needs_requests(range),
			range->content->kind == UFFD_SOURCE_FILE && !range->content->writes_cache,
			needs_requests(range) && range->content->overlay,
			range->page_size,
			(uint32_t)syscall(SYS_gettid),
		};
	close_access(&access);
	return range ? 0 : -ENOENT;
}

static int populate_from_here(const struct slices *all, struct uffd_populate_result *result)
{
	uint64_t reached;
	int r = for_slices(all, &result->filled, &reached);

	if (r == -ENOMEM)
		result->failed_at = all->ref.start + reached;
	return r;
}

/* Pages whose content is here come first: they keep no worker busy. */
static int populate_run(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			const struct needs *needs, uint64_t offset, uint64_t end, uint64_t chunk,
			struct uffd_populate_result *result_ret)
{
	struct uffd_populate_result asked = { 0 };
	int r = 0;

	*result_ret = (struct uffd_populate_result){ 0 };
	if (!needs->by_request || needs->is_mixed)
		r = populate_from_here(&(struct slices){ engine, *ref, offset, end, fill_slice,
							 fill_reach, NULL, needs->thread_id },
				       result_ret);
	if (r || !needs->by_request)
		return r;
	r = populate_by_request(engine, ref, needs->page_size, offset, end, chunk, &asked);
	result_ret->filled += asked.filled;
	result_ret->failed_at = asked.failed_at;
	return r;
}

int uffd_engine_populate(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			 uint64_t offset, uint64_t length, uint64_t chunk,
			 struct uffd_populate_result *result_ret)
{
	struct needs needs;
	int r = look_up(engine, ref, &needs);

	*result_ret = (struct uffd_populate_result){ 0 };
	if (r || !needs.is_filled)
		return r;
	return populate_run(engine, ref, &needs, offset, offset + length, chunk, result_ret);
}

static bool are_ranges(const uint64_t *words, uint64_t width, uint64_t count, uint64_t limit,
		       uint64_t page_size)
{
	for (uint64_t i = 0; i < count; i++, words += width)
		if (words[0] >= words[1] || words[1] > limit ||
		    (words[0] | words[1]) & (page_size - 1))
			return false;
	return true;
}

/* How many ranges to fault in at once, so that at most twice the wanted bytes are read. */
static uint64_t group_of(const uint64_t *words, uint64_t width, uint64_t count, uint64_t *end_ret)
{
	uint64_t start = words[0], end = words[1], wanted = end - start, n;

	for (n = 1; n < count; n++) {
		words += width;
		wanted += words[1] - words[0];
		if (words[0] < end || words[1] - start > GROUP_LIMIT ||
		    words[1] - start > 2 * wanted)
			break;
		end = words[1];
	}
	*end_ret = end;
	return n;
}

/* Ranges of a file that are close to each other: what they need is faulted in at once. */
static int populate_group(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			  const struct needs *needs, struct near_ranges *group, uint64_t end,
			  struct uffd_populate_result *result_ret)
{
	struct slices all = { engine, *ref, group->base + group->words[0], group->base + end,
			      NULL, group_reach, group, needs->thread_id };

	*result_ret = (struct uffd_populate_result){ 0 };
	fault_in_slices(&all);
	all.work = fill_group;
	all.reach = NULL;
	return populate_from_here(&all, result_ret);
}

int uffd_engine_populate_ranges(struct uffd_engine *engine, const struct uffd_range_ref *ref,
				uint64_t offset, uint64_t length, const uint64_t *words,
				uint64_t width, uint64_t count, uint64_t chunk,
				struct uffd_populate_result *result_ret)
{
	struct needs needs;
	uint64_t end;
	int r = look_up(engine, ref, &needs);

	*result_ret = (struct uffd_populate_result){ 0 };
	if (r == 0 && !are_ranges(words, width, count, length, needs.page_size))
		r = -EINVAL;
	if (r || !needs.is_filled)
		return r;
	for (uint64_t n; count && r == 0; count -= n, words += n * width) {
		struct uffd_populate_result part;
		struct near_ranges group;

		n = needs.reads_file ? group_of(words, width, count, &end) : 1;
		group = (struct near_ranges){ offset, words, width, n };
		if (n > 1)
			r = populate_group(engine, ref, &needs, &group, end, &part);
		else
			r = populate_run(engine, ref, &needs, offset + words[0], offset + words[1],
					 chunk, &part);
		result_ret->filled += part.filled;
		result_ret->failed_at = part.failed_at;
	}
	return r;
}
