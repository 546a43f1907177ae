// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "alloc.h"
#include "barrier.h"
#include "fill.h"
#include "open.h"
#include "page_table.h"
#include "range.h"
#include "serve.h"
#include "slices.h"
#include "space.h"
#include "spaces.h"

#define MADV_DONTNEED_LOCKED	24	/* Linux 5.18 */
/* A thread that touches the memory all the time gets in between in some of the attempts. */
#define ATTEMPTS		1000

/* A range that is being opened, as its userfaultfd sees it. */
struct target {
	struct uffd_engine *engine;
	const struct uffd_range_ref *ref;
	struct uffd_opening *opening;
	int fd;
	uint64_t start, length, page_size, mode;
	bool shared;
};

/*
 * Open the pieces in one space, and wake the threads that wait there.  `forked_ret`: forks
 * made since the range was added have pieces of it too.
 */
static int open_pieces(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		       uint64_t ioctls, bool *forked_ret)
{
	struct uffd_range *range;
	struct access access;
	int r = open_piece(engine, ref, &access, &range);
	bool whole;

	if (r)
		return r;
	*forked_ret = range->content->forks != atomic_load(&engine->forks_followed);
	whole = (range->end - range->start) >> range->page_shift == range->pages->count;
	if (!whole)
		range = uffd_table_next(access.space->table, 0);
	for (; range; range = whole ? NULL : uffd_table_next(access.space->table, range->end)) {
		if (range->space != access.space || range->id != ref->id)
			continue;
		atomic_store_explicit(&range->ioctls, ioctls, memory_order_release);
		/* Their messages have been read: woken, they fault again. */
		uffd_shim_wake(access.space->fd, range->start, range->end - range->start);
	}
	close_access(&access);
	return 0;
}

int uffd_engine_set_ioctls(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			   uint64_t ioctls)
{
	bool forked, ignored;
	uint32_t *forks;
	size_t found;
	int r = open_pieces(engine, ref, ioctls, &forked);

	/* Later forks copy a range that is open. */
	if (r || !forked)
		return r;
	r = list_forks(engine, &forks, &found);
	while (found--) {
		struct uffd_range_ref there = { forks[found], ref->id, ref->start };

		open_pieces(engine, &there, ioctls, &ignored);
	}
	uffd_free(forks);
	return r;
}

static bool find_target(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			struct target *target)
{
	struct uffd_range *range;
	struct access access;

	if (open_piece(engine, ref, &access, &range))
		return false;
	*target = (struct target){
		.fd = access.space->fd,
		.start = ref->start,
		.length = range->pages->count << range->page_shift,
		.page_size = range->page_size,
		.mode = range->mode,
		.shared = range->content->shared,
	};
	close_access(&access);
	return true;
}

static int register_target(const struct target *target)
{
	struct uffd_opening *opening = target->opening;
	int r = uffd_engine_note_registered(target->engine, target->ref->space, target->start,
					    target->start + target->length);

	opening->step = UFFD_OPEN_REGISTER;
	if (r == 0)
		r = uffd_shim_register(target->fd, target->start, target->length, target->mode,
				       &opening->ioctls);
	opening->supported = opening->ioctls;
	if (r == 0 && (opening->ioctls & opening->needed) != opening->needed)
		r = -EOPNOTSUPP;
	return r;
}

/* Let the threads that wait go on as before. */
static void unregister_target(const struct target *target)
{
	uint64_t before = target->opening->before, ignored;

	/* Those that waited before would get zeros. */
	if (!(before & UFFDIO_REGISTER_MODE_MISSING))
		uffd_shim_unregister(target->fd, target->start, target->length);
	/* Registering for fewer modes changes nothing. */
	if (before)
		uffd_shim_register(target->fd, target->start, target->length, before, &ignored);
	uffd_shim_wake(target->fd, target->start, target->length);
}

/* Whether nobody has filled a page: a helper process that was killed may have opened the range. */
static int is_unfilled(const struct target *target, uint64_t address, bool *ret)
{
	struct uffd_range *range;
	struct access access;
	int r = open_piece(target->engine, target->ref, &access, &range);

	if (r)
		return r;
	*ret = address < range->start || address >= range->end ||
	       atomic_load(state_of(range, page_of(range, address))) == UFFD_PAGE_ABSENT;
	close_access(&access);
	return 0;
}

/* -EEXIST: a page is present that nobody has filled.  No lock is held, since this may be slow. */
static int look(const struct target *target)
{
	struct uffd_opening *opening = target->opening;
	struct uffd_space *space = space_get(target->engine, target->ref->space);
	uint64_t at = target->start, end = at + target->length;
	bool unfilled = false;
	int r = 0, fd;

	opening->step = UFFD_OPEN_LOOK;
	if (!space)
		return -ESRCH;
	fd = opening->pagemap_fd >= 0 ? opening->pagemap_fd : space->pagemap_fd;
	while (fd >= 0 && r == 0 && at < end && next_present(fd, at, end, &at)) {
		r = is_unfilled(target, at, &unfilled);
		opening->present_at = at;
		if (r == 0 && unfilled)
			r = -EEXIST;
		at = (at & ~(target->page_size - 1)) + target->page_size;
	}
	space_put(space);
	return r;
}

static int drop_all(uint64_t address, uint64_t length, bool shared)
{
	void *start = (void *)(uintptr_t)address;

	/* EINVAL: locked memory, as mlockall(MCL_FUTURE) makes it. */
	if (madvise(start, length, MADV_DONTNEED) &&
	    (errno != EINVAL || madvise(start, length, MADV_DONTNEED_LOCKED)))
		return -errno;
	/* Last: a page that is touched later is in the page table, where it is noticed. */
	if (shared && madvise(start, length, MADV_REMOVE))
		return -errno;
	return 0;
}

static int send_all(int sock, const char *message, uint64_t size)
{
	while (size) {
		ssize_t n = send(sock, message, size, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		message += n;
		size -= (uint64_t)n;
	}
	return 0;
}

int uffd_register_dropped(const struct uffd_dropping *dropping, int sock, const void *message,
			  uint64_t size)
{
	uint64_t start = dropping->start, length = dropping->length, ignored;
	int r = uffd_shim_register(dropping->fd, start, length, dropping->mode, &ignored);

	if (r)
		return r;
	r = drop_all(start, length, dropping->shared);
	if (r == 0)
		r = send_all(sock, message, size);
	if (r) {
		uffd_shim_unregister(dropping->fd, start, length);
		uffd_shim_wake(dropping->fd, start, length);
	}
	return r;
}

/*
 * Nobody would read the event of dropping registered memory, and threads that touch memory
 * that is not registered make pages of zeros: try until none has.
 */
static int drop_unregistered(const struct target *target)
{
	int r;

	for (unsigned int i = 0; i < ATTEMPTS; i++) {
		unregister_target(target);
		target->opening->step = UFFD_OPEN_DROP;
		r = drop_all(target->start, target->length, target->shared);
		if (r == 0)
			r = register_target(target);
		if (r)
			return r;
		r = look(target);
		if (r != -EEXIST)
			return r;
	}
	return -EAGAIN;
}

static int drop(const struct target *target)
{
	struct uffd_space *space = space_get(target->engine, target->ref->space);
	bool sends;

	if (!space)
		return -ESRCH;
	sends = space->layout_events & UFFD_FEATURE_EVENT_REMOVE;
	space_put(space);
	if (sends && !target->opening->reads_events)
		return drop_unregistered(target);
	target->opening->step = UFFD_OPEN_DROP;
	return drop_all(target->start, target->length, target->shared);
}

static int poison(const struct target *target)
{
	const struct uffd_opening *opening = target->opening;
	struct uffd_range *range;
	struct access access;
	int r = 0;

	target->opening->step = UFFD_OPEN_POISON;
	for (uint64_t i = 0; i < opening->poison_count && r == 0; i++) {
		uint64_t from = opening->poison[2 * i], to = opening->poison[2 * i + 1];
		struct uffd_fill_result result;
		struct uffd_fill fill = {
			.fd = target->fd,
			.op = UFFD_FILL_POISON,
			.mode = UFFDIO_POISON_MODE_DONTWAKE,
			.dst = target->start + from,
			.length = to - from,
			.page_size = target->page_size,
			.limit_ns = target->engine->options.retry_limit_ns,
		};

		r = uffd_fill_run(&fill, &result);
		if (r == 0 && result.deferred)
			r = -EAGAIN;
		if (r == 0)
			r = open_piece(target->engine, target->ref, &access, &range);
		if (r)
			break;
		set_states(range, target->start + from, target->start + to, UFFD_PAGE_POISONED);
		close_access(&access);
	}
	return r;
}

static int take_in(const struct target *target)
{
	struct uffd_range *range;
	struct access access;
	int r = open_piece(target->engine, target->ref, &access, &range);

	if (r)
		return r;
	note_present(range);
	close_access(&access);
	return 0;
}

static int settle_present(const struct target *target)
{
	switch (target->opening->present) {
	case UFFD_PRESENT_REFUSE:
		return look(target);
	case UFFD_PRESENT_DROP:
		return drop(target);
	case UFFD_PRESENT_KEEP:
		return take_in(target);
	default:
		/* What is protected already is clean. */
		return target->engine->options.is_inline ? take_in(target) : 0;
	}
}

int uffd_engine_open(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     struct uffd_opening *opening)
{
	struct target target;
	int r;

	opening->ioctls = opening->supported = 0;
	opening->step = UFFD_OPEN_REGISTER;
	if (!find_target(engine, ref, &target))
		return -ENOENT;
	target.engine = engine;
	target.ref = ref;
	target.opening = opening;
	r = register_target(&target);
	uffd_barrier(UFFD_BARRIER_REGISTERED);
	if (r == 0)
		r = settle_present(&target);
	if (r == 0)
		r = poison(&target);
	if (r == 0)
		r = uffd_engine_set_ioctls(engine, ref, opening->ioctls);
	if (r && opening->ioctls && !opening->stays_registered) {
		unregister_target(&target);
		if (!opening->before)
			uffd_engine_note_unregistered(engine, ref->space, target.start,
						      target.start + target.length);
		opening->ioctls = 0;
	}
	return r;
}
