// SPDX-License-Identifier: MIT
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/clock.h"
#include "dirty/ranges.h"
#include "dirty/round.h"
#include "uffd_shim.h"

#define POPULATED (UFFD_PAGE_IS_PRESENT | UFFD_PAGE_IS_SWAPPED)
/* The reader of events gets a CPU in less. */
#define BUSY_NS 200000000u
#define RESET (UFFD_PM_SCAN_WP_MATCHING | UFFD_PM_SCAN_CHECK_WPASYNC)
/* Room for a little more than the round before has found. */
#define SPARE 64u
/*
 * Adjacent small mappings are scanned together, since a scan of one page costs a system call.  The
 * kernel holds the lock of the mappings until it has found enough, so that they are not too many.
 */
#define RUN_MAPPINGS 1000u
#define RUN_BYTES (64ull << 20)

struct round {
	int pagemap_fd;
	uint32_t flags;
	struct uffd_page_ranges *written;
	struct uffd_page_ranges *dropped;
	struct uffd_page_ranges *known;
	/* Reused from one mapping to the next. */
	struct uffd_page_ranges found;
};

/* Scan into `found`, which is emptied first. */
static int scan(struct round *round, struct uffd_tracked *at, struct uffd_pm_scan_arg *arg)
{
	int ret;

	arg->start = at->start;
	arg->end = at->end;
	arg->vec_len = UINT64_MAX;
	ret = uffd_pagemap_scan_again(round->pagemap_fd, arg, at->found + at->found / 8 + SPARE,
				      &round->found);
	at->found -= at->found / 4;
	if (at->found < round->found.count)
		at->found = round->found.count;
	return ret;
}

/* Append what was found; an array that is empty becomes the found one, which is empty then. */
static int keep(struct uffd_page_ranges *found, struct uffd_page_ranges *ranges)
{
	int ret = 0;

	if (!ranges->count) {
		struct uffd_page_ranges empty = *ranges;

		for (uint64_t i = 0; i < found->count; i++)
			found->vec[i].categories = 0;
		*ranges = *found;
		*found = empty;
		return 0;
	}
	for (uint64_t i = 0; !ret && i < found->count; i++)
		ret = uffd_ranges_append(ranges, found->vec[i].start, found->vec[i].end);
	return ret;
}

/* The first error matters, but what was found before it is protected now and must be kept. */
static int keep_after(int error, struct uffd_page_ranges *found, struct uffd_page_ranges *ranges)
{
	int ret = keep(found, ranges);

	return error ? error : ret;
}

/* While an event waits to be read, the kernel protects nothing. */
static int protect(int uffd, const struct uffd_page_region *at)
{
	uint64_t until_ns = 0;

	for (unsigned int attempt = 0;; attempt++) {
		int ret = uffd_shim_writeprotect(uffd, at->start, at->end - at->start,
						 UFFDIO_WRITEPROTECT_MODE_WP);

		if (ret != -EAGAIN)
			return ret;
		if (!until_ns)
			until_ns = uffd_now_ns() + BUSY_NS;
		else if (uffd_now_ns() > until_ns)
			return ret;
		uffd_back_off(attempt);
	}
}

int uffd_round_protect(int uffd, const struct uffd_page_region *vec, uint64_t count)
{
	int ret = 0;

	for (uint64_t i = 0; i < count; i++) {
		int r = protect(uffd, &vec[i]);

		if (r && !ret)
			ret = r;
	}
	return ret;
}

static bool peeks(const struct round *round)
{
	return round->flags & UFFD_ROUND_PEEK;
}

/* Pages without content and without a marker; `found` has them afterwards. */
static int scan_holes(struct round *round, struct uffd_tracked *at)
{
	struct uffd_pm_scan_arg arg = {
		.category_inverted = POPULATED,
		.category_mask = POPULATED,
		.return_mask = UFFD_PAGE_IS_WPALLOWED,
	};

	return scan(round, at, &arg);
}

/* One scan tells written from dropped, by whether the page has content; `found` is used up. */
static int split(struct uffd_page_ranges *found, struct uffd_page_ranges *written,
		 struct uffd_page_ranges *dropped)
{
	uint64_t kept = 0;
	int ret = 0;

	for (uint64_t i = 0; !ret && i < found->count; i++) {
		struct uffd_page_region at = found->vec[i];

		if (!(at.categories & POPULATED))
			ret = uffd_ranges_append(dropped, at.start, at.end);
		else if (kept && found->vec[kept - 1].end == at.start)
			found->vec[kept - 1].end = at.end;
		else
			found->vec[kept++] = at;
	}
	found->count = kept;
	return keep_after(ret, found, written);
}

/*
 * Private anonymous memory in one scan.  The categories are those of the page at the moment that
 * it was protected: a page that gets content later is written, and the next round says so.
 */
static int round_of_zeros(struct round *round, struct uffd_tracked *at)
{
	struct uffd_pm_scan_arg arg = {
		.flags = peeks(round) ? 0 : RESET,
		.category_mask = UFFD_PAGE_IS_WRITTEN,
		.return_mask = UFFD_PAGE_IS_WRITTEN | POPULATED,
	};
	int error = scan(round, at, &arg);
	int ret = split(&round->found, round->written, round->dropped);

	return error ? error : ret;
}

/* Add `found` to the pages of this mapping that were written. */
static int join(struct uffd_page_ranges *mine, const struct uffd_page_ranges *found)
{
	struct uffd_page_ranges joined = { 0 };
	int ret = uffd_ranges_union(mine->vec, mine->count, found->vec, found->count, &joined);

	if (ret) {
		free(joined.vec);
		return ret;
	}
	free(mine->vec);
	*mine = joined;
	return 0;
}

/* The holes that the one scan does not see.  A write into one now is copied with its content. */
static int add_holes(struct round *round, struct uffd_tracked *at,
		     struct uffd_page_ranges *mine)
{
	int ret = scan_holes(round, at);

	if (!ret && !peeks(round))
		ret = uffd_round_protect((int)at->uffd, round->found.vec, round->found.count);
	return ret ? ret : join(mine, &round->found);
}

/* Private copies that are no longer there: dropped, or on swap, which looks the same. */
static int add_lost_copies(struct round *round, struct uffd_tracked *at,
			   const struct uffd_page_region *known, uint64_t count,
			   struct uffd_page_ranges *mine)
{
	struct uffd_pm_scan_arg arg = {
		.category_inverted = UFFD_PAGE_IS_FILE,
		.category_mask = UFFD_PAGE_IS_PRESENT | UFFD_PAGE_IS_FILE,
		.return_mask = UFFD_PAGE_IS_WPALLOWED,
	};
	const struct uffd_page_region whole = { .start = at->start, .end = at->end };
	struct uffd_page_ranges before = { 0 }, lost = { 0 };
	int ret = scan(round, at, &arg);

	if (!ret)
		ret = uffd_ranges_intersect(known, count, &whole, 1, &before);
	if (!ret)
		ret = uffd_ranges_subtract(before.vec, before.count, round->found.vec,
					   round->found.count, &lost);
	if (!ret)
		ret = join(mine, &lost);
	if (!ret)
		ret = keep(&round->found, round->known);
	free(before.vec);
	free(lost.vec);
	return ret;
}

/*
 * A page with a file behind it: whatever is not protected may have been written.  Reclaim and
 * MADV_DONTNEED leave no trace of a written page but the lack of a marker.
 */
static int round_of_file(struct round *round, struct uffd_tracked *at,
			 const struct uffd_page_region *known, uint64_t count)
{
	struct uffd_pm_scan_arg arg = {
		.flags = peeks(round) ? 0 : RESET,
		.category_mask = UFFD_PAGE_IS_WRITTEN,
		.return_mask = UFFD_PAGE_IS_WRITTEN,
	};
	struct uffd_page_ranges mine = { 0 };
	int ret = scan(round, at, &arg);

	ret = keep_after(ret, &round->found, &mine);
	if (!ret && round->flags & UFFD_ROUND_HOLES_APART)
		ret = add_holes(round, at, &mine);
	if (!ret && at->backing == UFFD_BACKING_COPIED)
		ret = add_lost_copies(round, at, known, count, &mine);
	ret = keep_after(ret, &mine, round->written);
	free(mine.vec);
	return ret;
}

static int round_of_sparse(struct round *round, struct uffd_tracked *at,
			   const struct uffd_page_region *known, uint64_t count)
{
	struct uffd_pm_scan_arg arg = {
		.flags = peeks(round) ? 0 : RESET,
		.category_mask = UFFD_PAGE_IS_WRITTEN,
		.category_anyof_mask = POPULATED,
		.return_mask = UFFD_PAGE_IS_WRITTEN,
	};
	int ret = keep_after(scan(round, at, &arg), &round->found, round->written);

	/* Afterwards, so that this reports a page dropped since the scan. */
	if (!ret)
		ret = scan_holes(round, at);
	if (!ret)
		ret = uffd_ranges_subtract(round->found.vec, round->found.count, known, count,
					   round->dropped);
	return ret ? ret : keep(&round->found, round->known);
}

/*
 * Only pages that are reported are protected, and their content is read after that.  So a write
 * between the scan and the ioctl is in this round.
 */
static int round_of_huge(struct round *round, struct uffd_tracked *at)
{
	struct uffd_pm_scan_arg arg = {
		.flags = UFFD_PM_SCAN_CHECK_WPASYNC,
		.category_mask = UFFD_PAGE_IS_WRITTEN,
		.return_mask = UFFD_PAGE_IS_WRITTEN,
	};
	int ret = scan(round, at, &arg);

	if (!ret && !peeks(round))
		ret = uffd_round_protect((int)at->uffd, round->found.vec, round->found.count);
	return keep_after(ret, &round->found, round->written);
}

/* The index of the first range that ends above an address. */
static uint64_t first_above(const struct uffd_page_region *vec, uint64_t count, uint64_t address)
{
	uint64_t low = 0, high = count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (vec[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* The ranges of `known` that reach into a mapping. */
static uint64_t known_of(const struct uffd_tracked *at, const struct uffd_page_region *known,
			 uint64_t count, const struct uffd_page_region **first_ret)
{
	uint64_t first = first_above(known, count, at->start);
	uint64_t end = first_above(known, count, at->end);

	*first_ret = known + first;
	return end < count && known[end].start < at->end ? end + 1 - first : end - first;
}

static int round_of(struct round *round, struct uffd_tracked *at,
		    const struct uffd_page_region *known, uint64_t count)
{
	const struct uffd_page_region *mine;
	uint64_t mine_count = known_of(at, known, count, &mine);

	if (at->track == UFFD_TRACK_HUGE)
		return round_of_huge(round, at);
	if (at->track == UFFD_TRACK_SPARSE)
		return round_of_sparse(round, at, mine, mine_count);
	if (at->backing == UFFD_BACKING_ZERO)
		return round_of_zeros(round, at);
	return round_of_file(round, at, mine, mine_count);
}

/* How many mappings, from one on, are one range that is tracked in one way. */
static uint64_t run_of(const struct uffd_tracked *at, uint64_t count)
{
	uint64_t i = 1;

	if (at->track != UFFD_TRACK_DENSE)
		return 1;
	while (i < count && i < RUN_MAPPINGS && at[i].start == at[i - 1].end &&
	       at[i].end - at->start <= RUN_BYTES && at[i].track == at->track &&
	       at[i].backing == at->backing && at[i].uffd == at->uffd)
		i++;
	return i;
}

static int round_of_each(struct round *round, struct uffd_tracked *at, uint64_t count,
			 const struct uffd_page_region *known, uint64_t known_count)
{
	for (uint64_t i = 0; i < count; i++) {
		int ret = round_of(round, &at[i], known, known_count);

		at[i].error = (uint64_t)-ret;
		if (ret == -ENOMEM || ret == -ESRCH)
			return ret;
	}
	return 0;
}

static int without(struct uffd_page_ranges *mine, const struct uffd_page_ranges *others)
{
	struct uffd_page_ranges left = { 0 };
	int ret = uffd_ranges_subtract(mine->vec, mine->count, others->vec, others->count, &left);

	free(ret ? left.vec : mine->vec);
	if (!ret)
		*mine = left;
	return ret;
}

/*
 * A run that could not be scanned at once: one of its mappings is not registered any more, or is
 * gone.  What was found before it has been protected and kept; what is found now came later.
 */
static int round_of_rest(struct round *round, struct uffd_tracked *at, uint64_t count,
			 const struct uffd_page_region *known, uint64_t known_count)
{
	struct uffd_page_ranges written = { 0 }, dropped = { 0 };
	struct round again = *round;
	int ret, r;

	again.written = &written;
	again.dropped = &dropped;
	ret = round_of_each(&again, at, count, known, known_count);
	round->found = again.found;
	r = without(round->dropped, &written);
	if (!r)
		r = without(round->written, &dropped);
	if (!r)
		r = join(round->written, &written);
	if (!r)
		r = join(round->dropped, &dropped);
	free(written.vec);
	free(dropped.vec);
	return ret ? ret : r;
}

static int round_of_run(struct round *round, struct uffd_tracked *at, uint64_t count,
			const struct uffd_page_region *known, uint64_t known_count)
{
	struct uffd_tracked whole = *at;
	int ret;

	if (count == 1)
		return round_of_each(round, at, 1, known, known_count);
	whole.end = at[count - 1].end;
	ret = round_of(round, &whole, known, known_count);
	at->found = whole.found;
	if (ret && ret != -ENOMEM && ret != -ESRCH)
		return round_of_rest(round, at, count, known, known_count);
	if (ret)
		return ret;
	for (uint64_t i = 0; i < count; i++)
		at[i].error = 0;
	return 0;
}

int uffd_round(int pagemap_fd, struct uffd_tracked *tracked, uint64_t count, uint32_t flags,
	       const struct uffd_page_region *known, uint64_t known_count,
	       struct uffd_page_ranges *written_ret, struct uffd_page_ranges *dropped_ret,
	       struct uffd_page_ranges *known_ret)
{
	struct round round = {
		.pagemap_fd = pagemap_fd,
		.flags = flags,
		.written = written_ret,
		.dropped = dropped_ret,
		.known = known_ret,
	};
	int ret = 0;

	for (uint64_t i = 0, run; !ret && i < count; i += run) {
		run = run_of(&tracked[i], count - i);
		ret = round_of_run(&round, &tracked[i], run, known, known_count);
	}
	free(round.found.vec);
	return ret ? ret : uffd_pagemap_alive(pagemap_fd);
}

int uffd_round_populated(int pagemap_fd, uint64_t start, uint64_t end, uint64_t *bytes_ret)
{
	struct uffd_pm_scan_arg arg = {
		.start = start,
		.end = end,
		.vec_len = UINT64_MAX,
		.category_anyof_mask = POPULATED,
		.return_mask = UFFD_PAGE_IS_WPALLOWED,
	};
	struct uffd_page_ranges found = { 0 };
	uint64_t walked = 0;
	int ret = uffd_pagemap_scan_all(pagemap_fd, &arg, &found, &walked);

	*bytes_ret = 0;
	if (!ret)
		ret = uffd_pagemap_bytes(found.vec, found.count, bytes_ret);
	free(found.vec);
	return ret;
}
