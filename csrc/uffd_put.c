// SPDX-License-Identifier: MIT
/* Putting pages in place, and marking those that have no content.  Async-signal-safe. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "uffd_engine_internal.h"

void set_states(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state)
{
	for (; at < end; at += range->page_size)
		atomic_store_explicit(state_of(range, at), state, memory_order_release);
}

static const void *zeros_for(struct uffd_engine *engine, uint64_t page_size)
{
	return page_size <= ZEROS_SIZE ? engine->zeros : atomic_load(&engine->huge_zeros);
}

static struct uffd_fill fill_of(const struct uffd_range *range, enum uffd_fill_op op, uint64_t at,
				uint64_t length, uint64_t source, uint64_t mode, uint64_t limit_ns)
{
	return (struct uffd_fill){
		.fd = range->space->fd,
		.op = op,
		.dst = at,
		.src = source,
		.length = length,
		.mode = mode,
		.page_size = range->page_size,
		.limit_ns = limit_ns,
		.leaves_waiters = op == UFFD_FILL_COPY && is_huge(range),
	};
}

static uint64_t copy_mode(const struct uffd_range *range)
{
	return range->mode & UFFDIO_REGISTER_MODE_WP ? UFFDIO_COPY_MODE_WP : 0;
}

/* Zeros, by COPY where ZEROPAGE is not to be had or cannot protect the page. */
int put_zeros(struct uffd_range *range, uint64_t at, uint64_t length, uint64_t limit_ns,
	      struct uffd_fill_result *result_ret)
{
	bool by_copy = range->mode & UFFDIO_REGISTER_MODE_WP || !has_ioctl(range, _UFFDIO_ZEROPAGE);
	uint64_t zeros = (uint64_t)(uintptr_t)zeros_for(range->space->engine, range->page_size);
	uint64_t step = !by_copy ? length : range->page_size > ZEROS_SIZE ? range->page_size
									  : ZEROS_SIZE;
	int r = 0;

	*result_ret = (struct uffd_fill_result){ 0 };
	for (uint64_t done = 0; done < length && r == 0 && !result_ret->deferred; done += step) {
		struct uffd_fill fill =
			fill_of(range, by_copy ? UFFD_FILL_COPY : UFFD_FILL_ZERO, at + done,
				length - done < step ? length - done : step, zeros,
				by_copy ? copy_mode(range) : 0, limit_ns);
		struct uffd_fill_result part;

		r = uffd_fill_run(&fill, &part);
		result_ret->done += part.done;
		result_ret->already_present += part.already_present;
		if (part.deferred)
			result_ret->deferred = length - done - part.done - part.already_present;
	}
	return r;
}

int put_continue(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret)
{
	uint64_t mode = range->mode & UFFDIO_REGISTER_MODE_WP ? UFFDIO_CONTINUE_MODE_WP : 0;
	struct uffd_fill fill = fill_of(range, UFFD_FILL_CONTINUE, at, length, 0, mode, 0);

	return uffd_fill_run(&fill, result_ret);
}

void *local_address(const struct uffd_range *range, uint64_t at)
{
	return (void *)(uintptr_t)(range->content->local + content_offset(range, at));
}

int put_bytes(struct uffd_range *range, uint64_t at, uint64_t length, uint64_t source,
	      enum uffd_fault_kind kind, struct uffd_fill_result *result_ret)
{
	struct uffd_fill fill =
		fill_of(range, UFFD_FILL_COPY, at, length, source, copy_mode(range), 0);

	if (kind != UFFD_KIND_MINOR)
		return uffd_fill_run(&fill, result_ret);
	memcpy(local_address(range, at), (const void *)(uintptr_t)source, length);
	return put_continue(range, at, length, result_ret);
}

static int put_source(struct uffd_range *range, uint64_t at, uint64_t length,
		      struct uffd_fill_result *result_ret)
{
	const struct uffd_content *content = range->content;
	uint64_t offset = content_offset(range, at);
	uint64_t covered = uffd_content_covered(content, offset, length);
	int r;

	if (!covered)
		return -ENODATA;
	r = put_bytes(range, at, covered, uffd_content_address(content, offset),
		      UFFD_KIND_MISSING, result_ret);
	if (r == 0 && uffd_content_covered(content, offset, covered) < covered)
		note_failure(range->space->engine, at, covered, -ENODATA, UFFD_FAILED_SOURCE);
	return r;
}

int put_content(struct uffd_range *range, uint64_t at, uint64_t length,
		enum uffd_fault_kind kind, struct uffd_fill_result *result_ret)
{
	const struct uffd_content *content = range->content;
	int r = 0;

	*result_ret = (struct uffd_fill_result){ 0 };
	if (kind == UFFD_KIND_MINOR) {
		if (content->writes_cache)
			r = uffd_content_read(content, local_address(range, at),
					      content_offset(range, at), length);
		return r ? r : put_continue(range, at, length, result_ret);
	}
	if (content->kind == UFFD_SOURCE_ZERO || content->kind == UFFD_SOURCE_NONE)
		return put_zeros(range, at, length, 0, result_ret);
	return put_source(range, at, length, result_ret);
}

int poison_pages(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret)
{
	struct uffd_fill fill = fill_of(range, UFFD_FILL_POISON, at, length, 0, 0, 0);
	int r = uffd_fill_run(&fill, result_ret);

	if (result_ret->done)
		count(range->space->engine, COUNTER(poisoned_pages),
		      result_ret->done >> range->page_shift);
	return r;
}

/* One page, for good: a write-protect marker is no page, but POISON says EEXIST to it. */
uint8_t poison_one(struct uffd_range *range, uint64_t page, bool *put_off_ret)
{
	struct uffd_fill_result result;
	int r = poison_pages(range, page, range->page_size, &result);

	if (r == 0 && result.already_present && range->mode & UFFDIO_REGISTER_MODE_WP) {
		uffd_shim_writeprotect(range->space->fd, page, range->page_size,
				       UFFDIO_WRITEPROTECT_MODE_DONTWAKE);
		r = poison_pages(range, page, range->page_size, &result);
	}
	*put_off_ret = r == 0 && result.deferred;
	if (r == 0 && result.done)
		return UFFD_PAGE_POISONED;
	if (r || !result.already_present)
		return UFFD_PAGE_ABSENT;
	/* It was there, and has lost its protection: count it as written. */
	return range->mode & UFFDIO_REGISTER_MODE_WP ? UFFD_PAGE_DIRTY : UFFD_PAGE_CLEAN;
}

void poison_page(struct uffd_range *range, uint64_t page)
{
	bool put_off;
	uint8_t state = poison_one(range, page, &put_off);

	uffd_barrier(UFFD_BARRIER_PLACED);
	atomic_store(state_of(range, page), state);
	/*
	 * While the layout changes POISON says EAGAIN: whoever waits must ask again.
	 * The same goes for a mark that was dropped before the state said so: that fault
	 * was left to us.
	 */
	if (put_off || state != UFFD_PAGE_ABSENT)
		uffd_shim_wake(range->space->fd, page, range->page_size);
}
