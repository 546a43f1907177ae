// SPDX-License-Identifier: MIT
/* Put pages in place, or poison those without content.  Async-signal-safe. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "barrier.h"
#include "failures.h"
#include "fill.h"
#include "page_table.h"
#include "put.h"
#include "stats.h"

void unclaim(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state)
{
	set_states(range, at, end, state);
	if (at < end)
		uffd_shim_wake(range->space->fd, at, end - at);
}

/*
 * The ioctl wakes the waiters before the pages' states say that they are present; a
 * thread that faults again in between was left waiting for us.
 */
void wake_again(struct uffd_range *range, uint64_t at, uint64_t end)
{
	if (at < end)
		uffd_shim_wake(range->space->fd, at, end - at);
}

/*
 * A fault is counted, then its page is looked at a last time (resolve.c).  Here the states
 * are set, then the count is read.  So at least one of the two sees the other.
 */
void wake_turned_away(struct uffd_range *range, uint64_t at, uint64_t end, uint64_t before)
{
	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load(&range->space->engine->turned_away) != before)
		wake_again(range, at, end);
}

static const void *zeros_for(struct uffd_engine *engine, uint64_t page_size)
{
	return page_size <= ZEROS_SIZE ? engine->zeros : atomic_load(&engine->huge_zeros);
}

static uint64_t continue_mode(const struct uffd_range *range)
{
	return range->mode & UFFDIO_REGISTER_MODE_WP ? UFFDIO_CONTINUE_MODE_WP : 0;
}

static bool is_late(enum fill_for why)
{
	return why == FILL_MISSING_LATE || why == FILL_MINOR_LATE;
}

/* The bit is the same one for all of these; POISON always wakes. */
_Static_assert(UFFDIO_COPY_MODE_DONTWAKE == UFFDIO_ZEROPAGE_MODE_DONTWAKE &&
		       UFFDIO_COPY_MODE_DONTWAKE == UFFDIO_CONTINUE_MODE_DONTWAKE,
	       "modes");

static struct uffd_fill fill_of(const struct uffd_range *range, enum uffd_fill_op op, uint64_t at,
				uint64_t length, uint64_t source, uint64_t mode, enum fill_for why)
{
	return (struct uffd_fill){
		.fd = range->space->fd,
		.op = op,
		.dst = at,
		.src = source,
		.length = length,
		.mode = mode | (is_late(why) ? UFFDIO_COPY_MODE_DONTWAKE : 0),
		.page_size = range->page_size,
		.leaves_waiters = is_late(why) || (op == UFFD_FILL_COPY && is_huge(range)),
		.cached_mode = continue_mode(range),
	};
}

static uint64_t copy_mode(const struct uffd_range *range)
{
	return range->mode & UFFDIO_REGISTER_MODE_WP ? UFFDIO_COPY_MODE_WP : 0;
}

static bool is_ahead(enum fill_for why)
{
	return why == FILL_AHEAD || why == FILL_CHECKED;
}

/*
 * Without a fault it is unknown whether the page cache holds the page, so a fill ahead
 * maps the cache's page.  A missing fault that finds one is followed by a minor fault.
 */
static bool maps_cached(const struct uffd_range *range, enum fill_for why)
{
	/* COPY says EEXIST of a huge page that the cache holds, and if none is free. */
	return is_ahead(why) && (range->mode & UFFDIO_REGISTER_MODE_MINOR ||
				     (is_huge(range) && range->content->shared));
}

/* A private mapping shows the page cache until it has private copies. */
static bool asks_cache(const struct uffd_range *range, enum fill_for why)
{
	return is_ahead(why) && !range->content->shared &&
	       !atomic_load_explicit(&range->content->is_anonymous, memory_order_relaxed);
}

static int fill_from(struct uffd_range *range, struct uffd_fill *fill, enum fill_for why,
		     struct uffd_fill_result *result_ret)
{
	int r;

	fill->maps_cached = maps_cached(range, why);
	fill->asks_cache = asks_cache(range, why);
	r = uffd_fill_run(fill, result_ret);
	if (result_ret->has_no_cache)
		atomic_store(&range->content->is_anonymous, true);
	return r;
}

/* Fill with zeros; COPY if ZEROPAGE is unavailable or the page must arrive protected. */
int put_zeros(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
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
				by_copy ? copy_mode(range) : 0, why);
		struct uffd_fill_result part;

		r = fill_from(range, &fill, why, &part);
		result_ret->done += part.done;
		result_ret->already_present += part.already_present;
		if (part.deferred)
			result_ret->deferred = length - done - part.done - part.already_present;
	}
	return r;
}

int put_continue(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
		 struct uffd_fill_result *result_ret)
{
	struct uffd_fill fill =
		fill_of(range, UFFD_FILL_CONTINUE, at, length, 0, continue_mode(range), why);

	return uffd_fill_run(&fill, result_ret);
}

int put_going(struct uffd_range *range, uint64_t page)
{
	struct uffd_fill_result result;
	int r = put_continue(range, page, range->page_size, FILL_MINOR, &result);

	return r == 0 && result.deferred ? -EAGAIN : r;
}

static void *local_address(const struct uffd_range *range, uint64_t at)
{
	return (void *)(uintptr_t)(range->content->local + content_offset(range, at));
}

/* Writes pages of a range to the page cache. */
struct cache_writer {
	int (*write)(const struct uffd_range *range, uint64_t at, uint64_t length, uint64_t source);
	uint64_t source;	/* of the first page */
};

static int write_bytes(const struct uffd_range *range, uint64_t at, uint64_t length,
		       uint64_t source)
{
	memcpy(local_address(range, at), (const void *)(uintptr_t)source, length);
	return 0;
}

static int write_content(const struct uffd_range *range, uint64_t at, uint64_t length,
			 uint64_t source)
{
	(void)source;
	return uffd_content_read(range->content, local_address(range, at),
				 content_offset(range, at), length);
}

/*
 * Fill through the page cache.  A page that is mapped already was filled by others: writes
 * to it since are in the cache, so keep it.
 */
static int put_by_cache(struct uffd_range *range, uint64_t at, uint64_t length,
			struct cache_writer writer, enum fill_for why,
			struct uffd_fill_result *result_ret)
{
	struct uffd_fill_result part;
	uint64_t done = 0;
	int r = 0;

	*result_ret = (struct uffd_fill_result){ 0 };
	while (done < length && r == 0 && !result_ret->deferred) {
		uint64_t run = unmapped_run(range, at + done, length - done);

		if (run)
			r = writer.write(range, at + done, run, writer.source + done);
		if (r)
			break;
		/* A page that is mapped gives EEXIST, and its waiters are woken. */
		r = put_continue(range, at + done, run ? run : range->page_size, why, &part);
		result_ret->done += part.done;
		result_ret->already_present += part.already_present;
		done += part.done + part.already_present;
		if (r == -EFAULT)
			/* A hole was punched in the meantime. */
			r = 0, part.deferred = length - done;
		if (part.deferred)
			result_ret->deferred = length - done;
	}
	return r;
}

int put_bytes(struct uffd_range *range, uint64_t at, uint64_t length, uint64_t source,
	      enum fill_for why, struct uffd_fill_result *result_ret)
{
	struct uffd_fill fill =
		fill_of(range, UFFD_FILL_COPY, at, length, source, copy_mode(range), why);

	if (range->content->writes_cache)
		return put_by_cache(range, at, length, (struct cache_writer){ write_bytes, source },
				    why, result_ret);
	return fill_from(range, &fill, why, result_ret);
}

/* A page of several leaves, or in which the source ends: put it together, then copy it. */
static int put_together(struct uffd_range *range, struct uffd_overlay *overlay, uint64_t page,
			enum fill_for why, struct uffd_fill_result *result_ret)
{
	uint64_t offset = content_offset(range, page);
	void *room = uffd_overlay_borrow(overlay);
	int r;

	if (!room)
		return -ENOMEM;
	if (overlay == range->content->overlay)
		r = uffd_overlay_read(overlay, room, offset, range->page_size);
	else
		r = uffd_content_read_tail(range->content, room);
	if (r == 0)
		r = put_bytes(range, page, range->page_size, (uint64_t)(uintptr_t)room, why,
			      result_ret);
	uffd_overlay_give_back(overlay, room);
	return r;
}

static int put_tail(struct uffd_range *range, uint64_t page, enum fill_for why,
		    struct uffd_fill_result *result_ret)
{
	const struct uffd_content *content = range->content;

	if (content->kept)
		return put_bytes(range, page, range->page_size,
				 (uint64_t)(uintptr_t)content->kept, why, result_ret);
	return put_together(range, content->tail, page, why, result_ret);
}

static int put_source(struct uffd_range *range, uint64_t at, uint64_t length,
		      enum fill_for why, struct uffd_fill_result *result_ret)
{
	const struct uffd_content *content = range->content;
	uint64_t offset = content_offset(range, at);
	uint64_t covered = length;
	int r;

	if (uffd_content_is_tail(content, offset))
		return put_tail(range, at, why, result_ret);
	if (why != FILL_CHECKED)
		covered = uffd_content_covered(content, offset, length);
	if (!covered)
		return -ENODATA;
	r = put_bytes(range, at, covered, content->address + offset, why, result_ret);
	/* The file was cut as it was copied: what was copied may be zeros. */
	if (r == 0 && why != FILL_CHECKED &&
	    uffd_content_covered(content, offset, covered) < covered)
		note_failure(range->space->engine, at, covered, -ENODATA, UFFD_FAILED_SOURCE);
	return r;
}

static uint64_t stretch_covered(const struct uffd_range *range, const struct uffd_stretch *stretch,
				uint64_t length)
{
	uint64_t covered = length;

	if (stretch->file)
		covered = uffd_file_covered(stretch->file, stretch->file_at, length);
	return covered == length ? length : covered & ~(range->page_size - 1);
}

static int put_stretch(struct uffd_range *range, uint64_t at, const struct uffd_stretch *stretch,
		       enum fill_for why, struct uffd_fill_result *result_ret)
{
	uint64_t covered;
	int r;

	if (stretch->kind == UFFD_STRETCH_REQUEST)
		return -ENODATA;	/* nobody claims such a page to fill it from here */
	if (stretch->kind == UFFD_STRETCH_MIXED)
		return put_together(range, range->content->overlay, at, why, result_ret);
	if (stretch->kind == UFFD_STRETCH_ZERO)
		return put_zeros(range, at, stretch->length, why, result_ret);
	covered = stretch_covered(range, stretch, stretch->length);
	if (!covered)
		return -ENODATA;
	r = put_bytes(range, at, covered, stretch->address, why, result_ret);
	if (r == 0 && stretch_covered(range, stretch, covered) < covered)
		note_failure(range->space->engine, at, covered, -ENODATA, UFFD_FAILED_SOURCE);
	return r;
}

static int put_overlay(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
		       struct uffd_fill_result *result_ret)
{
	uint64_t done = 0;
	int r = 0;

	while (done < length && r == 0 && !result_ret->deferred) {
		struct uffd_stretch stretch =
			uffd_overlay_stretch(range->content->overlay,
					     content_offset(range, at + done), length - done);
		struct uffd_fill_result part = { 0 };
		uint64_t put;

		r = put_stretch(range, at + done, &stretch, why, &part);
		put = part.done + part.already_present;
		result_ret->done += part.done;
		result_ret->already_present += part.already_present;
		done += put;
		if (part.deferred)
			result_ret->deferred = length - done;
		/* The file has lost the rest: the attempt at the next page reports that. */
		if (put < stretch.length)
			break;
	}
	return r;
}

int put_content(struct uffd_range *range, uint64_t at, uint64_t length, enum fill_for why,
		struct uffd_fill_result *result_ret)
{
	const struct uffd_content *content = range->content;

	*result_ret = (struct uffd_fill_result){ 0 };
	if (!is_ahead(why) && content->overlay)
		uffd_overlay_read_around(content->overlay, content_offset(range, at), length);
	if (content->writes_cache)
		return put_by_cache(range, at, length, (struct cache_writer){ write_content, 0 },
				    why, result_ret);
	if (why == FILL_MINOR || why == FILL_MINOR_LATE ||
	    !(range->mode & UFFDIO_REGISTER_MODE_MISSING))
		return put_continue(range, at, length, why, result_ret);
	if (content->kind == UFFD_SOURCE_ZERO || content->kind == UFFD_SOURCE_NONE)
		return put_zeros(range, at, length, why, result_ret);
	if (content->overlay)
		return put_overlay(range, at, length, why, result_ret);
	/* Workers are asked for all else. */
	if (content->outline && is_zeros(range, at))
		return put_zeros(range, at, length, why, result_ret);
	return put_source(range, at, length, why, result_ret);
}

int poison_pages(struct uffd_range *range, uint64_t at, uint64_t length,
		 struct uffd_fill_result *result_ret)
{
	struct uffd_fill fill = fill_of(range, UFFD_FILL_POISON, at, length, 0, 0, FILL_MISSING);
	int r = uffd_fill_run(&fill, result_ret);

	if (result_ret->done)
		count(range->space->engine, COUNTER(poisoned_pages),
		      result_ret->done >> range->page_shift);
	return r;
}

/* A write-protect marker is not a page, but POISON fails on it with EEXIST: remove it. */
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
	/* The page lies behind the file's end by now: a woken thread gets SIGBUS from the kernel. */
	if (r == -EFAULT)
		uffd_shim_wake(range->space->fd, page, range->page_size);
	if (r == 0 && result.done)
		return UFFD_PAGE_POISONED;
	if (r || !result.already_present)
		return UFFD_PAGE_ABSENT;
	/* It was present, and has lost its protection: count it as written. */
	return range->mode & UFFDIO_REGISTER_MODE_WP ? UFFD_PAGE_DIRTY : UFFD_PAGE_CLEAN;
}

void poison_page(struct uffd_range *range, uint64_t page)
{
	bool put_off;
	uint8_t state = poison_one(range, page, &put_off);

	uffd_barrier(UFFD_BARRIER_PLACED);
	atomic_store(state_of(range, page), state);
	/*
	 * While the layout changes POISON fails with EAGAIN, so waiters must fault again.
	 * So must a thread that found the poison dropped before the state was set: its
	 * fault was left to us.
	 */
	if (put_off || state != UFFD_PAGE_ABSENT)
		uffd_shim_wake(range->space->fd, page, range->page_size);
}
