// SPDX-License-Identifier: MIT
/* What failed, and what of it was mended. */
#define _GNU_SOURCE
#include "failures.h"
#include "stats.h"

static void note_first(struct engine_shared *shared, const struct uffd_failure *failure)
{
	if (atomic_fetch_add(&shared->failures, 1))
		return;
	shared->failure = *failure;
	atomic_store(&shared->failure_known, true);
}

void note_failure(struct uffd_engine *engine, uint64_t address, uint64_t length, int error,
		  enum uffd_failure_stage stage)
{
	struct uffd_failure failure = {
		.address = address,
		.length = length,
		.error = -error,
		.stage = stage,
	};

	count(engine, COUNTER(failed), 1);
	note_first(engine->shared, &failure);
}

static uint32_t pages_kept(struct engine_shared *shared)
{
	uint32_t kept = atomic_load(&shared->failed_count);

	return kept < FAILURES_KEPT ? kept : FAILURES_KEPT;
}

/* The page has failed before, and has not been mended since. */
static bool fails_again(struct engine_shared *shared, const struct failed_page *new)
{
	for (uint32_t i = 0, kept = pages_kept(shared); i < kept; i++) {
		struct failed_page *page = &shared->failed[i];

		if (!atomic_load(&page->times) || atomic_load(&page->mended) ||
		    page->space != new->space || page->id != new->id ||
		    page->offset != new->offset)
			continue;
		atomic_fetch_add(&page->times, 1);
		return true;
	}
	return false;
}

static void keep(struct uffd_engine *engine, const struct failed_page *new)
{
	struct engine_shared *shared = engine->shared;
	uint32_t at;

	count(engine, COUNTER(failed), 1);
	note_first(shared, &new->failure);
	if (fails_again(shared, new))
		return;
	at = atomic_fetch_add(&shared->failed_count, 1);
	if (at >= FAILURES_KEPT) {
		atomic_store(&shared->failed_count, FAILURES_KEPT);
		return;
	}
	shared->failed[at].space = new->space;
	shared->failed[at].id = new->id;
	shared->failed[at].offset = new->offset;
	shared->failed[at].failure = new->failure;
	atomic_store(&shared->failed[at].times, 1);
}

void note_failed_page(struct uffd_range *range, uint64_t page, int error,
		      enum uffd_failure_stage stage)
{
	keep(range->space->engine, &(struct failed_page){
		.space = range->space->number,
		.id = range->id,
		.offset = content_offset(range, page),
		.failure = { 0, page, range->page_size, -error, stage },
	});
}

void note_failed_offset(struct uffd_engine *engine, const struct uffd_request *request,
			uint64_t offset, int error, enum uffd_failure_stage stage)
{
	keep(engine, &(struct failed_page){
		.space = request->space,
		.id = request->id,
		.offset = offset,
		.failure = { 0, request->address + (offset - request->offset),
			     request->page_size, -error, stage },
	});
}

static bool is_of(const struct failed_page *page, const struct uffd_range *range)
{
	return atomic_load(&page->times) && !atomic_load(&page->mended) &&
	       page->space == range->space->number && page->id == range->id &&
	       page->offset >= range->origin &&
	       page->offset - range->origin < range->end - range->start;
}

/* A page that its owner has dropped never got what it lacked. */
static bool is_mended(const struct failed_page *page, const struct uffd_range *range)
{
	uint8_t state = atomic_load(&range->pages->state[page->offset >> range->page_shift]);

	return state == UFFD_PAGE_SAVED || state == UFFD_PAGE_DIRTY ||
	       (state == UFFD_PAGE_CLEAN && page->failure.stage != UFFD_FAILED_SAVE);
}

void settle_failures(struct uffd_range *range, uint64_t offset, uint64_t end)
{
	struct engine_shared *shared = range->space->engine->shared;

	for (uint32_t i = 0, kept = pages_kept(shared); i < kept; i++) {
		struct failed_page *page = &shared->failed[i];

		if (is_of(page, range) && page->offset >= offset && page->offset < end &&
		    is_mended(page, range))
			atomic_store(&page->mended, true);
	}
}

uint64_t count_failed(struct uffd_range *range, uint64_t offset, uint64_t end)
{
	struct engine_shared *shared = range->space->engine->shared;
	uint64_t found = 0;

	for (uint32_t i = 0, kept = pages_kept(shared); i < kept; i++) {
		const struct failed_page *page = &shared->failed[i];

		found += is_of(page, range) && page->offset >= offset && page->offset < end &&
			 !is_mended(page, range);
	}
	return found;
}

void uffd_engine_failure(struct uffd_engine *engine, struct uffd_failure *failure_ret)
{
	struct engine_shared *shared = engine->shared;
	uint64_t failures = atomic_load(&shared->failures), mended = 0;
	const struct failed_page *first = NULL;
	bool first_is_mended = false;

	*failure_ret = (struct uffd_failure){ 0 };
	if (!atomic_load(&shared->failure_known))
		return;
	for (uint32_t i = 0, kept = pages_kept(shared); i < kept; i++) {
		const struct failed_page *page = &shared->failed[i];

		if (!atomic_load(&page->mended)) {
			first = !first && atomic_load(&page->times) ? page : first;
			continue;
		}
		mended += atomic_load(&page->times);
		first_is_mended |= page->failure.address == shared->failure.address;
	}
	if (mended >= failures)
		return;
	*failure_ret = first_is_mended && first ? first->failure : shared->failure;
	failure_ret->count = failures - mended;
}
