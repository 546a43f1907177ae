// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "base/page.h"
#include "fill.h"
#include "base/clock.h"

#define PAGE_MASK	UINT64_C(4095)

static int fill_once(const struct uffd_fill *fill, uint64_t at, uint64_t left, int64_t *done_ret)
{
	uint64_t dst = fill->dst + at;

	switch (fill->op) {
	case UFFD_FILL_COPY:
		return uffd_shim_copy(fill->fd, dst, fill->src + at, left, fill->mode, done_ret);
	case UFFD_FILL_ZERO:
		return uffd_shim_zeropage(fill->fd, dst, left, fill->mode, done_ret);
	case UFFD_FILL_CONTINUE:
		return uffd_shim_continue(fill->fd, dst, left, fill->mode, done_ret);
	case UFFD_FILL_POISON:
		return uffd_shim_poison(fill->fd, dst, left, fill->mode, done_ret);
	case UFFD_FILL_MOVE:
		return uffd_shim_move(fill->fd, dst, fill->src + at, left, fill->mode, done_ret);
	default:
		*done_ret = 0;
		return -EINVAL;
	}
}

/*
 * COPY fails with EEXIST if the page is mapped, or if only the page cache holds it, and
 * on hugetlb also if no huge page is free.  CONTINUE tells these apart.
 */
static int map_cached(const struct uffd_fill *fill, uint64_t at)
{
	int64_t done;
	int r = uffd_shim_continue(fill->fd, fill->dst + at, fill->page_size, fill->cached_mode,
				   &done);

	/* Without CONTINUE for this memory they cannot be told apart. */
	if (r == -EINVAL)
		return -EEXIST;
	if (r == -EFAULT)
		return fill->page_size > BASE_PAGE ? -ENOMEM : -EAGAIN;
	return r;
}

/* Map the page cache's page; if there is none (EFAULT), fill as requested. */
static int fill_hole(const struct uffd_fill *fill, uint64_t at, int64_t *done_ret,
		     struct uffd_fill_result *result)
{
	int r = uffd_shim_continue(fill->fd, fill->dst + at, fill->page_size, fill->cached_mode,
				   done_ret);

	result->has_no_cache = r == -EINVAL;
	return r == -EINVAL || r == -EFAULT ? fill_once(fill, at, fill->page_size, done_ret) : r;
}

void uffd_fault_in(uint64_t address, uint64_t length, uint32_t for_writing)
{
	uint64_t from = address & ~PAGE_MASK;
	uint64_t to = (address + length + PAGE_MASK) & ~PAGE_MASK;

	/* Ignore errors: the ioctl or the access reports them. */
	if (length)
		madvise((void *)(uintptr_t)from, to - from,
			for_writing ? UFFD_MADV_POPULATE_WRITE : UFFD_MADV_POPULATE_READ);
}

/* Half of the span, in whole pages. */
static uint64_t halve(uint64_t span, uint64_t page_size)
{
	span = span / 2 & ~(page_size - 1);
	return span < page_size ? page_size : span;
}

/*
 * One ioctl must stay within one VMA, and fails at once with ENOENT otherwise: mprotect
 * or madvise may have split the registered range.  Then try smaller spans, and larger
 * ones again once that worked.
 */
int uffd_fill_run(const struct uffd_fill *fill, struct uffd_fill_result *result_ret)
{
	uint64_t at = 0, give_up = 0, span = fill->length;
	unsigned int attempt = 0;
	int saved_errno = errno;
	int r = 0;

	*result_ret = (struct uffd_fill_result){ 0 };
	while (at < fill->length) {
		uint64_t left = fill->length - at < span ? fill->length - at : span;
		int64_t done = 0;

		if (fill->asks_cache && !result_ret->has_no_cache) {
			left = fill->page_size;
			r = fill_hole(fill, at, &done, result_ret);
		} else {
			r = fill_once(fill, at, left, &done);
		}
		if (r == 0) {
			done = (int64_t)left;
			span = span > fill->length / 2 ? fill->length : 2 * span;
		}
		if (r == -ENOENT && left > fill->page_size) {
			span = halve(left, fill->page_size);
			r = 0;
			continue;
		}
		/*
		 * Private memory (asks_cache) has asked the cache above: its EEXIST means a
		 * private copy.
		 */
		if (r == -EEXIST && fill->maps_cached && !fill->asks_cache) {
			r = map_cached(fill, at);
			done = r ? 0 : (int64_t)fill->page_size;
		}
		if (r == 0 || (r == -EAGAIN && done > 0)) {
			at += (uint64_t)done;
			result_ret->done += (uint64_t)done;
			attempt = 0;
			r = 0;
			continue;
		}
		if (r == -EEXIST) {
			/* Present, but a waiter may still sleep: EEXIST does not wake. */
			if (!fill->leaves_waiters)
				uffd_shim_wake(fill->fd, fill->dst + at, fill->page_size);
			at += fill->page_size;
			result_ret->already_present += fill->page_size;
			attempt = 0;
			r = 0;
			continue;
		}
		if (r != -EAGAIN)
			break;
		if (attempt == 0)
			give_up = uffd_now_ns() + fill->limit_ns;
		else if (uffd_now_ns() >= give_up)
			attempt = UINT32_MAX;
		if (fill->limit_ns == 0 || attempt == UINT32_MAX) {
			result_ret->deferred = fill->length - at;
			r = 0;
			break;
		}
		uffd_back_off(attempt++);
	}
	errno = saved_errno;
	return r;
}
