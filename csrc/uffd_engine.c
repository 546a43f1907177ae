// SPDX-License-Identifier: MIT
/* Engines: their ranges, the step of whoever leads, and work done from outside it. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "uffd_alloc.h"
#include "uffd_engine_internal.h"

#define BASE_PAGE		4096u
#define ZEROS_SIZE		(2u << 20)
#define HUGE_ZEROS_SIZE		(1u << 30)

/*
 * Prefetch yields to waiting faults after this much: some 50 us of copying, and
 * the cost of the extra ioctl is lost in it.
 */
#define PREFETCH_SLICE		(512u << 10)
/* For a reader in sequence, who waits for all of it anyway. */
#define SEQUENTIAL_SLICE	(2u << 20)
/* Populating and sealing go through a range in pieces, so that faults get between. */
#define BULK_SLICE		(4u << 20)
/* Messages read at once; the buffer grows when a read fills it. */
#define FIRST_MESSAGES		128
/* Descriptors served in one step of an engine that has many. */
#define SPACES_AT_ONCE		64

/* Ranges */

static int ensure_zeros(struct uffd_engine *engine, uint64_t page_size)
{
	const void *expected = NULL;
	void *zeros;

	if (page_size <= ZEROS_SIZE || atomic_load(&engine->huge_zeros))
		return 0;
	zeros = mmap(NULL, HUGE_ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		     -1, 0);
	if (zeros == MAP_FAILED)
		return -errno;
	if (!atomic_compare_exchange_strong(&engine->huge_zeros, &expected, zeros))
		munmap(zeros, HUGE_ZEROS_SIZE);
	return 0;
}

static struct uffd_pages *pages_for(struct uffd_space *space, const struct uffd_range_spec *spec,
				    bool absent)
{
	struct uffd_range *other = spec->id ? any_piece(space, spec->id, spec->start) : NULL;
	uint64_t count = spec->length / spec->page_size;
	uint8_t state = absent ? UFFD_PAGE_ABSENT : UFFD_PAGE_CLEAN;
	struct uffd_pages *pages;

	if (other)
		return uffd_pages_get(other->pages);
	if (spec->states_fd < 0)
		return uffd_pages_create(count, state);
	pages = uffd_pages_map(spec->states_fd, spec->states_offset, count);
	if (pages && !spec->id)
		memset((void *)pages->state, state, count);
	return pages;
}

static int add_range(struct uffd_space *space, const struct uffd_range_spec *spec, uint64_t id)
{
	struct uffd_range like = {
		.page_size = spec->page_size,
		.page_shift = (uint32_t)__builtin_ctzll(spec->page_size),
		.mode = spec->mode,
		.id = id,
	};
	uint64_t length = spec->id ? spec->piece_length : spec->length;
	struct uffd_range *range = NULL;
	int r = uffd_content_create(spec, &like.content);

	if (r)
		return r;
	like.pages = pages_for(space, spec, can_be_absent(&like));
	if (like.pages) {
		range = range_create(space, &like, spec->start, spec->start + length, spec->origin);
		uffd_pages_put(like.pages);
	}
	uffd_content_put(like.content);
	if (!range)
		return -ENOMEM;
	/*
	 * An unmapping of what was here before may be under way: its event, which
	 * would take this range out again, is read before the layout is still.
	 */
	wait_for_layout(space);
	gate_enter(space);
	r = uffd_table_insert(space->table, range);
	if (r == 0 && !spec->id)
		report_added(range);
	gate_leave(space);
	if (r)
		range_free(range);
	return r;
}

int uffd_engine_add(struct uffd_engine *engine, uint32_t number,
		    const struct uffd_range_spec *spec, uint64_t *id_ret)
{
	struct uffd_space *space = space_get(engine, number);
	int r;

	*id_ret = spec->id ? spec->id : atomic_fetch_add(&engine->next_id, 1);
	if (atomic_load(&engine->next_id) <= spec->id)
		atomic_store(&engine->next_id, spec->id + 1);
	if (!space)
		return -ESRCH;
	r = ensure_zeros(engine, spec->page_size);
	if (r == 0)
		r = add_range(space, spec, *id_ret);
	space_put(space);
	return r;
}

/* Between open and shut nothing that is found goes away, nor does the layout change. */
struct visit {
	struct uffd_space *space;
	unsigned int shard;
};

static bool open_visit(struct uffd_engine *engine, uint32_t number, struct visit *visit)
{
	visit->space = space_get(engine, number);
	if (!visit->space)
		return false;
	gate_enter(visit->space);
	visit->shard = uffd_table_enter(visit->space->table, current_cpu());
	return true;
}

static void shut_visit(struct visit *visit)
{
	uffd_table_leave(visit->space->table, visit->shard);
	gate_leave(visit->space);
	space_put(visit->space);
}

int uffd_engine_set_ioctls(struct uffd_engine *engine, uint32_t number, uint64_t id,
			   uint64_t start, uint64_t ioctls)
{
	struct uffd_range *range;
	struct visit visit;

	if (!open_visit(engine, number, &visit))
		return -ESRCH;
	range = any_piece(visit.space, id, start);
	if (range)
		__atomic_store_n(&range->ioctls, ioctls, __ATOMIC_RELAXED);
	shut_visit(&visit);
	return range ? 0 : -ENOENT;
}

static enum uffd_fault_kind filling_kind(const struct uffd_range *range)
{
	return range->mode & UFFDIO_REGISTER_MODE_MISSING && !range->content->writes_cache
		? UFFD_KIND_MISSING : UFFD_KIND_MINOR;
}

/*
 * Go through [offset, end) of a serving in slices, opening and shutting the gate
 * for each.  `work` says how far it came; EAGAIN is tried again for a while.
 */
typedef uint64_t (*slice_work)(struct uffd_range *range, uint64_t at, uint64_t end,
			       int *error_ret, uint64_t *done_ret);

static int for_slices(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t start,
		      uint64_t offset, uint64_t end, slice_work work, uint64_t *done_ret)
{
	uint64_t give_up = 0;
	unsigned int attempt = 0;
	bool gone;
	int error = 0;

	*done_ret = 0;
	while (offset < end) {
		struct uffd_range *range;
		uint64_t at, stop, done = 0, slice;
		struct visit visit;

		if (!open_visit(engine, number, &visit))
			return -ESRCH;
		error = 0;
		range = NULL;
		if (!atomic_load(&visit.space->gone))
			range = find_piece(visit.space, id, offset, start + offset);
		if (range) {
			slice = BULK_SLICE > range->page_size ? BULK_SLICE : range->page_size;
			at = range->start + (offset - range->origin);
			stop = at + (end - offset < slice ? end - offset : slice);
			at = work(range, at, stop < range->end ? stop : range->end, &error, &done);
			offset = content_offset(range, at);
		}
		gone = atomic_load(&visit.space->gone);
		shut_visit(&visit);
		if (!range)
			return gone ? -ESRCH : -ENOENT;
		*done_ret += done;
		if (done || !error)
			attempt = 0;
		if (error != -EAGAIN && error != -ENOMEM && error)
			return error;
		if (!error)
			continue;
		if (attempt == 0)
			give_up = uffd_now_ns() + engine->options.retry_limit_ns;
		else if (uffd_now_ns() > give_up)
			return error;
		uffd_back_off(attempt++);
	}
	return 0;
}

/*
 * The ioctl wakes whoever waits, before the pages' states say that they are there;
 * a thread that faults again in between was taken for one that waits for us.
 */
void wake_again(struct uffd_range *range, uint64_t at, uint64_t end)
{
	if (at < end)
		uffd_shim_wake(range->space->fd, at, end - at);
}

static uint64_t fill_slice(struct uffd_range *range, uint64_t at, uint64_t end, int *error_ret,
			   uint64_t *done_ret)
{
	uint64_t past = fill_absent(range, at, end, filling_kind(range), error_ret, done_ret);

	wake_again(range, at, past);
	return past;
}

/* Ask workers for everything absent, a few requests at a time. */
#define POPULATE_OUTSTANDING	32

static uint64_t request_slice(struct uffd_range *range, uint64_t at, uint64_t end,
			      int *error_ret, uint64_t *done_ret)
{
	struct uffd_engine *engine = range->space->engine;
	uint64_t chunk = engine->options.prefetch > range->page_size ? engine->options.prefetch
								     : range->page_size;
	uint64_t stop;

	*error_ret = 0;
	while (at < end && atomic_load(state_of(range, at)) != UFFD_PAGE_ABSENT)
		at += range->page_size;
	if (at >= end)
		return end;
	if (atomic_load(&engine->outstanding) >= POPULATE_OUTSTANDING) {
		*error_ret = -EAGAIN;
		*done_ret = 0;
		return at;
	}
	for (stop = at; stop < end && stop - at < chunk; stop += range->page_size) {
		uint8_t expected = UFFD_PAGE_ABSENT;

		if (!atomic_compare_exchange_strong(state_of(range, stop), &expected,
						    UFFD_PAGE_IN_FLIGHT))
			break;
	}
	if (stop > at && !queue_request(range, at, stop, filling_kind(range), NULL)) {
		unclaim(range, at, stop, UFFD_PAGE_ABSENT);
		*error_ret = -ENOMEM;
		return at;
	}
	*done_ret = stop - at;
	return stop;
}

static int populate_by_request(struct uffd_engine *engine, uint32_t number, uint64_t id,
			       uint64_t start, uint64_t offset, uint64_t end,
			       uint64_t *filled_ret)
{
	uint64_t failures = atomic_load(&engine->shared->failures);
	int r = for_slices(engine, number, id, start, offset, end, request_slice, filled_ret);
	unsigned int attempt = 0;

	while (r == 0 && atomic_load(&engine->outstanding) && !atomic_load(&engine->stop))
		uffd_back_off(attempt++);
	return r == 0 && atomic_load(&engine->shared->failures) != failures ? -EIO : r;
}

int uffd_engine_populate(struct uffd_engine *engine, uint32_t number, uint64_t id,
			 uint64_t start, uint64_t offset, uint64_t length, uint64_t *filled_ret)
{
	bool absent = false, by_request = false;
	struct uffd_range *range;
	struct visit visit;

	*filled_ret = 0;
	if (!open_visit(engine, number, &visit))
		return -ESRCH;
	range = any_piece(visit.space, id, start);
	if (range) {
		absent = can_be_absent(range);
		by_request = needs_request(range);
	}
	shut_visit(&visit);
	if (!range)
		return -ENOENT;
	if (!absent)
		return 0;
	if (by_request)
		return populate_by_request(engine, number, id, start, offset, offset + length,
					   filled_ret);
	return for_slices(engine, number, id, start, offset, offset + length, fill_slice,
			  filled_ret);
}

static uint64_t preserve_slice(struct uffd_range *range, uint64_t at, uint64_t end,
			       int *error_ret, uint64_t *done_ret)
{
	const struct uffd_content *content = range->content;
	uint64_t stop = at, limit = PREFETCH_SLICE > range->page_size ? PREFETCH_SLICE
								      : range->page_size;
	uint8_t expected = UFFD_PAGE_CLEAN;
	const void *from;

	*error_ret = 0;
	while (stop < end && stop - at < limit &&
	       atomic_compare_exchange_strong(state_of(range, stop), &expected,
					      UFFD_PAGE_IN_FLIGHT))
		stop += range->page_size;
	if (stop == at && expected == UFFD_PAGE_IN_FLIGHT) {
		/* A fault is saving it: done is done only when that is. */
		*error_ret = -EAGAIN;
		return at;
	}
	if (stop == at)
		return at + range->page_size;
	from = (const void *)(uintptr_t)(content->local ? content->local + content_offset(range, at)
							: at);
	memcpy((void *)(uintptr_t)(content->preserve + content_offset(range, at)), from, stop - at);
	count(range->space->engine, COUNTER(preserved_pages), (stop - at) >> range->page_shift);
	/*
	 * Where this says EAGAIN the pages stay protected, and their first write
	 * finds them saved.  Writers that came meanwhile were sent away: wake them.
	 */
	set_states(range, at, stop, UFFD_PAGE_SAVED);
	if (uffd_shim_writeprotect(range->space->fd, at, stop - at, 0))
		wake_again(range, at, stop);
	*done_ret = stop - at;
	return stop;
}

int uffd_engine_preserve(struct uffd_engine *engine, uint32_t number, uint64_t id,
			 uint64_t start, uint64_t offset, uint64_t length, uint64_t *saved_ret)
{
	struct uffd_range *range;
	struct visit visit;
	bool can = false;

	*saved_ret = 0;
	if (!open_visit(engine, number, &visit))
		return -ESRCH;
	range = any_piece(visit.space, id, start);
	if (range)
		can = range->content->preserve;
	shut_visit(&visit);
	if (!range)
		return -ENOENT;
	return can ? for_slices(engine, number, id, start, offset, offset + length,
				preserve_slice, saved_ret)
		   : -EINVAL;
}

int uffd_engine_mark_clean(struct uffd_engine *engine, uint32_t number, uint64_t id,
			   uint64_t start)
{
	struct uffd_range *range;
	struct visit visit;

	if (!open_visit(engine, number, &visit))
		return -ESRCH;
	range = any_piece(visit.space, id, start);
	for (uint64_t i = 0; range && i < range->pages->count; i++) {
		uint8_t state = atomic_load(&range->pages->state[i]);

		if (state == UFFD_PAGE_DIRTY || state == UFFD_PAGE_SAVED ||
		    (state == UFFD_PAGE_REMOVED && !can_be_absent(range)))
			atomic_compare_exchange_strong(&range->pages->state[i], &state,
						       UFFD_PAGE_CLEAN);
	}
	shut_visit(&visit);
	return range ? 0 : -ENOENT;
}

int uffd_engine_states(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t start,
		       uint64_t first_page, uint64_t pages, uint8_t *states_ret)
{
	struct uffd_range *range;
	struct visit visit;
	int r = 0;

	if (!open_visit(engine, number, &visit))
		return -ESRCH;
	range = any_piece(visit.space, id, start);
	if (!range)
		r = -ENOENT;
	else if (first_page + pages > range->pages->count)
		r = -EINVAL;
	for (uint64_t i = 0; r == 0 && i < pages; i++)
		states_ret[i] = atomic_load_explicit(&range->pages->state[first_page + i],
						     memory_order_acquire);
	shut_visit(&visit);
	return r;
}

void uffd_engine_refuse(struct uffd_engine *engine)
{
	atomic_store(&engine->refusing, true);
}

/* Taking ranges out */

static uint64_t poison_slice(struct uffd_range *range, uint64_t at, uint64_t end, int *error_ret,
			     uint64_t *done_ret)
{
	struct uffd_fill_result result;
	uint64_t stop = at;
	uint8_t expected = UFFD_PAGE_ABSENT;
	uint64_t past;

	*error_ret = 0;
	/*
	 * Where forks share the memory they share the states, but a mark is in one
	 * address space alone: what is poisoned elsewhere is poisoned here too.
	 */
	if (range->content->shared && atomic_load(state_of(range, at)) == UFFD_PAGE_POISONED)
		expected = UFFD_PAGE_POISONED;
	while (stop < end && atomic_compare_exchange_strong(state_of(range, stop), &expected,
							    UFFD_PAGE_IN_FLIGHT))
		stop += range->page_size;
	if (stop == at && expected == UFFD_PAGE_IN_FLIGHT) {
		*error_ret = -EAGAIN;
		return at;
	}
	if (stop == at)
		return at + range->page_size;
	*error_ret = poison_pages(range, at, stop - at, &result);
	past = at + result.done + result.already_present;
	set_states(range, at, past, UFFD_PAGE_POISONED);
	unclaim(range, past, stop, UFFD_PAGE_ABSENT);
	if (*error_ret == 0 && result.deferred)
		*error_ret = -EAGAIN;
	*done_ret = result.done;
	return past;
}

static uint64_t unprotect_slice(struct uffd_range *range, uint64_t at, uint64_t end,
				int *error_ret, uint64_t *done_ret)
{
	*done_ret = 0;
	*error_ret = uffd_shim_writeprotect(range->space->fd, at, end - at, 0);
	return *error_ret ? at : end;
}

struct piece {
	uint64_t start, offset, end, mode;
	bool loses_content, can_poison, preserves;
	uint64_t pages_left;
};

static bool look_at_piece(struct uffd_engine *engine, uint32_t number, uint64_t id,
			  uint64_t hint, struct piece *piece)
{
	struct uffd_range *range;
	struct visit visit;

	if (!open_visit(engine, number, &visit))
		return false;
	range = any_piece(visit.space, id, hint);
	if (range)
		*piece = (struct piece){
			.start = range->start - range->origin,
			.offset = range->origin,
			.end = range->origin + range->end - range->start,
			.mode = range->mode,
			.can_poison = has_ioctl(range, _UFFDIO_POISON),
			.preserves = range->content->preserve,
			.loses_content = can_be_absent(range) &&
					 range->content->kind != UFFD_SOURCE_ZERO &&
					 range->content->kind != UFFD_SOURCE_NONE,
		};
	shut_visit(&visit);
	return range;
}

/* Errors do not stop it: the owner may be gone, and the range goes in any case. */
static int seal_piece(struct uffd_engine *engine, uint32_t number, uint64_t id,
		      const struct piece *piece)
{
	uint64_t ignored;
	int r = 0;

	if (piece->preserves)
		r = for_slices(engine, number, id, piece->start, piece->offset, piece->end,
			       preserve_slice, &ignored);
	if (r == 0 && piece->mode & UFFDIO_REGISTER_MODE_WP)
		r = for_slices(engine, number, id, piece->start, piece->offset, piece->end,
			       unprotect_slice, &ignored);
	if (r == 0 && piece->loses_content && piece->can_poison)
		r = for_slices(engine, number, id, piece->start, piece->offset, piece->end,
			       poison_slice, &ignored);
	else if (r == 0 && piece->loses_content)
		r = uffd_engine_populate(engine, number, id, piece->start, piece->offset,
					 piece->end - piece->offset, &ignored);
	return r;
}

/* Returns whether it was the serving's last piece in this space. */
static bool drop_piece(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t hint,
		       bool unregister)
{
	struct uffd_space *space = space_get(engine, number);
	struct uffd_range *range;
	bool last = true;

	if (!space)
		return true;
	gate_close(space);
	range = any_piece(space, id, hint);
	if (range) {
		last = atomic_load(&range->pages->references) == 1;
		if (unregister)
			uffd_shim_unregister(space->fd, range->start, range->end - range->start);
		uffd_table_remove(space->table, range);
		range_free(range);
	}
	gate_leave(space);
	space_put(space);
	return last;
}

static int unserve_in(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t start,
		      uint32_t flags)
{
	struct piece piece;
	int r, result = 0;

	do {
		if (!look_at_piece(engine, number, id, start, &piece))
			break;
		r = flags & UFFD_UNSERVE_SEAL ? seal_piece(engine, number, id, &piece) : 0;
		if (r && r != -ENOENT && r != -ESRCH)
			result = r;
		uffd_barrier(UFFD_BARRIER_UNSERVE_SEALED);
	} while (!drop_piece(engine, number, id, piece.start + piece.offset,
			     flags & UFFD_UNSERVE_UNREGISTER));
	report_dropped(engine, number, id);
	return result;
}

int uffd_engine_unserve(struct uffd_engine *engine, uint32_t number, uint64_t id, uint64_t start,
			uint32_t flags)
{
	int r = unserve_in(engine, number, id, start, flags), other;
	uint32_t *forks = NULL;
	struct uffd_space *space;
	size_t found = 0;

	pthread_mutex_lock(&engine->spaces_lock);
	if (atomic_load(&engine->space_count) > 1)
		forks = uffd_alloc(atomic_load(&engine->space_count) * sizeof(*forks));
	if (forks)
		LIST_FOREACH(space, &engine->spaces, link)
			if (space->owned)
				forks[found++] = space->number;
	pthread_mutex_unlock(&engine->spaces_lock);
	while (found--) {
		other = unserve_in(engine, forks[found], id, start, flags);
		r = r ? r : other;
	}
	uffd_free(forks);
	return r;
}

/* Making and unmaking engines */

static bool init_descriptors(struct uffd_engine *engine)
{
	engine->wake_fd = engine->stop_fd = engine->watchdog_fd = engine->owner_pidfd = -1;
	engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	return engine->epoll_fd >= 0;
}

int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret)
{
	struct uffd_engine *engine = uffd_alloc(sizeof(*engine));
	void *zeros;
	int r = -ENOMEM;

	*ret = NULL;
	if (!engine)
		return -ENOMEM;
	engine->options = *options;
	pthread_mutex_init(&engine->spaces_lock, NULL);
	pthread_mutex_init(&engine->requests_lock, NULL);
	pthread_cond_init(&engine->requests_changed, NULL);
	TAILQ_INIT(&engine->queued);
	TAILQ_INIT(&engine->taken);
	LIST_INIT(&engine->spaces);
	atomic_store(&engine->next_id, 1);
	pthread_mutex_init(&engine->keeper_lock, NULL);
	engine->shared = options->shared ? options->shared : uffd_alloc(sizeof(*engine->shared));
	engine->messages_capacity = FIRST_MESSAGES;
	engine->messages = uffd_alloc(FIRST_MESSAGES * sizeof(*engine->messages));
	zeros = mmap(NULL, ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	engine->zeros = zeros == MAP_FAILED ? NULL : zeros;
	if (!init_descriptors(engine))
		r = -errno;
	else if (engine->shared && engine->messages && engine->zeros)
		engine->primary = space_create(engine, options->fd, false, options->has_events);
	if (!engine->primary || watch_space(engine, engine->primary)) {
		uffd_engine_destroy(engine);
		return r;
	}
	*ret = engine;
	return 0;
}

/* Every range has been taken out and the driver has stopped. */
void uffd_engine_destroy(struct uffd_engine *engine)
{
	const void *huge_zeros = atomic_load(&engine->huge_zeros);
	struct uffd_space *space;

	while ((space = LIST_FIRST(&engine->spaces)))
		space_retire(space);
	free_requests(engine);
	native_close(engine);
	if (huge_zeros)
		munmap((void *)(uintptr_t)huge_zeros, HUGE_ZEROS_SIZE);
	if (engine->zeros)
		munmap((void *)(uintptr_t)engine->zeros, ZEROS_SIZE);
	if (engine->epoll_fd >= 0)
		close(engine->epoll_fd);
	pthread_cond_destroy(&engine->requests_changed);
	pthread_mutex_destroy(&engine->requests_lock);
	pthread_mutex_destroy(&engine->spaces_lock);
	pthread_mutex_destroy(&engine->keeper_lock);
	uffd_free(engine->deferred);
	uffd_free(engine->messages);
	if (!engine->options.shared)
		uffd_free(engine->shared);
	uffd_free(engine);
}

int watch_space(struct uffd_engine *engine, struct uffd_space *space)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = space };

	if (epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, space->fd, &event))
		return -errno;
	kick_leader(engine);
	return 0;
}

int uffd_engine_add_space(struct uffd_engine *engine, int fd, uint32_t has_events,
			  uint32_t *space_ret)
{
	struct uffd_space *space = space_create(engine, fd, false, has_events);
	int r;

	if (!space)
		return -ENOMEM;
	*space_ret = space->number;
	r = watch_space(engine, space);
	if (r)
		space_retire(space);
	return r;
}

int uffd_engine_adopt_space(struct uffd_engine *engine, int fd, uint32_t is_fork,
			    uint32_t has_events, uint32_t number)
{
	struct uffd_space *space;
	int r;

	if (engine->next_space <= number)
		engine->next_space = number;
	space = space_create(engine, fd, is_fork, has_events);
	if (!space)
		return -ENOMEM;
	/* Spaces come in any order before the start: the next new one follows the highest. */
	if (space->number != number) {
		engine->next_space--;
		space->number = number;
	}
	r = watch_space(engine, space);
	if (r)
		space_retire(space);
	return r;
}

void uffd_engine_wake_all(struct uffd_engine *engine)
{
	struct uffd_space *space;
	struct uffd_range *range;

	pthread_mutex_lock(&engine->spaces_lock);
	LIST_FOREACH(space, &engine->spaces, link) {
		gate_enter(space);
		for (range = uffd_table_next(space->table, 0); range;
		     range = uffd_table_next(space->table, range->end))
			uffd_shim_wake(space->fd, range->start, range->end - range->start);
		gate_leave(space);
	}
	pthread_mutex_unlock(&engine->spaces_lock);
}

int uffd_engine_remove_space(struct uffd_engine *engine, uint32_t number)
{
	struct uffd_space *space = space_get(engine, number);
	unsigned int attempt = 0;

	if (!space)
		return -ESRCH;
	if (space == engine->primary) {
		space_put(space);
		return -EINVAL;
	}
	if (engine->thread_running) {
		/* The leader may hold it: it must be the one to let go. */
		atomic_store(&space->gone, true);
		atomic_fetch_add(&engine->doomed_spaces, 1);
		while (atomic_load(&space->references) > 1) {
			kick_leader(engine);
			uffd_back_off(attempt++);
		}
	} else {
		epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, space->fd, NULL);
		space_retire(space);
	}
	space_put(space);
	return 0;
}

uint64_t uffd_engine_shared_size(void)
{
	return sizeof(struct engine_shared);
}

uint32_t uffd_engine_spaces(struct uffd_engine *engine)
{
	return atomic_load(&engine->space_count);
}

uint32_t uffd_engine_owner_exited(struct uffd_engine *engine)
{
	return atomic_load(&engine->owner_exited);
}

/* For the leader: letting go of a space whose memory is no more. */
void forget_space(struct uffd_engine *engine, struct uffd_space *space)
{
	size_t kept = 0;

	for (size_t i = 0; i < engine->deferred_count; i++)
		if (engine->deferred[i].space != space)
			engine->deferred[kept++] = engine->deferred[i];
	engine->deferred_count = kept;
	kept = 0;
	for (size_t i = 0; i < engine->job_count; i++)
		if (engine->jobs[i].space != space)
			engine->jobs[kept++] = engine->jobs[i];
	engine->job_count = kept;
	epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, space->fd, NULL);
	/* The engine's own space stays, for who serves and unserves; it is silent now. */
	if (space != engine->primary)
		space_retire(space);
}

/* Spaces are asked in turn, the oldest first, whether their owner lives. */
void reap_spaces(struct uffd_engine *engine, uint32_t most)
{
	struct uffd_space *space, *dead[SPACES_AT_ONCE];
	uint32_t doomed = atomic_exchange(&engine->doomed_spaces, 0);
	uint32_t total, asked = 0, found = 0, position = 0;

	if (atomic_load(&engine->space_count) == 1)
		return;
	pthread_mutex_lock(&engine->spaces_lock);
	total = atomic_load(&engine->space_count);
	LIST_FOREACH(space, &engine->spaces, link) {
		bool mine = (position++ + total - engine->reap_position % total) % total < most;

		if (space == engine->primary || found == SPACES_AT_ONCE)
			continue;
		if ((doomed && atomic_load(&space->gone)) ||
		    ((mine || atomic_load(&space->gone)) && ++asked && space_is_dead(space)))
			dead[found++] = space;
	}
	engine->reap_position += most;
	pthread_mutex_unlock(&engine->spaces_lock);
	while (found--)
		forget_space(engine, dead[found]);
}

/* Prefetching, for the leader */

static void push_job(struct uffd_range *range, uint64_t at, uint64_t end,
		     enum uffd_fault_kind kind)
{
	struct uffd_engine *engine = range->space->engine;

	if (at >= end)
		return;
	if (engine->job_count == PREFETCH_JOBS) {
		/* The oldest guess is the worst one. */
		memmove(&engine->jobs[0], &engine->jobs[1],
			(PREFETCH_JOBS - 1) * sizeof(engine->jobs[0]));
		engine->job_count--;
	}
	engine->jobs[engine->job_count++] =
		(struct prefetch_job){ range->space, at, end, kind };
}

static void plan_prefetch(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind)
{
	struct uffd_engine *engine = range->space->engine;
	uint64_t from, to;

	if (!engine->options.prefetch || kind == UFFD_KIND_WP || needs_request(range))
		return;
	for (size_t i = 0; i < engine->job_count; i++)
		if (engine->jobs[i].space == range->space && page >= engine->jobs[i].at &&
		    page < engine->jobs[i].end)
			return;
	prefetch_span(range, page, &from, &to);
	push_job(range, from, page, kind);
	push_job(range, page + range->page_size, to, kind);
}

/* A slice of the newest job. */
static void fill_slice_of(struct uffd_range *range, struct prefetch_job *job, uint64_t slice)
{
	struct uffd_engine *engine = range->space->engine;
	uint64_t filled, end;
	int error;

	if (slice < range->page_size)
		slice = range->page_size;
	end = job->end - job->at > slice ? job->at + slice : job->end;
	job->at = fill_absent(range, job->at, end, job->kind, &error, &filled);
	count(engine, COUNTER(prefetched_pages), filled >> range->page_shift);
	/* A page that cannot be had now is left to its own fault. */
	if (error || job->at >= job->end)
		engine->job_count--;
}

bool run_prefetch_slice(struct uffd_engine *engine)
{
	struct prefetch_job *job;
	struct uffd_table *table;
	struct uffd_range *range;
	unsigned int shard;

	if (!engine->job_count)
		return false;
	job = &engine->jobs[engine->job_count - 1];
	table = job->space->table;
	shard = uffd_table_enter(table, current_cpu());
	range = uffd_table_find(table, job->at);
	if (!range || job->end > range->end || atomic_load(&engine->refusing))
		engine->job_count--;
	else
		fill_slice_of(range, job, PREFETCH_SLICE);
	uffd_table_leave(table, shard);
	return true;
}

/*
 * A reader in sequence that has caught up with the newest job waits for the page
 * that comes next anyway.  Resolving that page alone would wake it for one page,
 * and where both threads share a CPU it would fault on the next before the job
 * got on: a large slice at once serves both.
 */
static bool is_next_in_line(const struct uffd_range *range, uint64_t page,
			    enum uffd_fault_kind kind)
{
	const struct uffd_engine *engine = range->space->engine;
	const struct prefetch_job *job = &engine->jobs[engine->job_count - 1];

	return engine->job_count && kind == job->kind && job->space == range->space &&
	       job->at == page && job->end <= range->end && !atomic_load(&engine->refusing);
}

static enum outcome fill_in_line(struct uffd_range *range, uint64_t page)
{
	struct uffd_engine *engine = range->space->engine;
	struct prefetch_job *job = &engine->jobs[engine->job_count - 1];

	fill_slice_of(range, job, SEQUENTIAL_SLICE);
	/* Not filled (no content, put off): the ordinary way knows what to do. */
	return atomic_load(state_of(range, page)) == UFFD_PAGE_CLEAN
		? OUTCOME_RESOLVED : resolve_page(range, page, job->kind);
}

/* The step */

/* A registered range that nobody serves: its threads would wait for ever. */
static void refuse_unserved(struct uffd_space *space, uint64_t address)
{
	static const uint64_t sizes[] = { BASE_PAGE, 2u << 20, 1u << 30 };
	struct uffd_engine *engine = space->engine;
	int r = -EINVAL;

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]) && r == -EINVAL; i++) {
		struct uffd_fill fill = {
			.fd = space->fd,
			.op = UFFD_FILL_POISON,
			.dst = address & ~(sizes[i] - 1),
			.length = sizes[i],
			.page_size = sizes[i],
		};
		struct uffd_fill_result result;

		r = uffd_fill_run(&fill, &result);
	}
	if (r == -ENOENT || r == -ESRCH) {
		/* Unregistered since the fault was sent, which woke its threads. */
		count(engine, COUNTER(layout_changed), 1);
		return;
	}
	count(engine, COUNTER(unserved), 1);
	note_failure(engine, address, 0, r ? r : -EFAULT, UFFD_FAILED_UNSERVED);
}

/* NULL leaves the old block as it was. */
static void *grow(void *block, size_t used, size_t size)
{
	void *larger = uffd_alloc(size);

	if (!larger)
		return NULL;
	if (used)
		memcpy(larger, block, used);
	uffd_free(block);
	return larger;
}

void defer_fault(struct uffd_engine *engine, const struct deferred_fault *fault)
{
	for (size_t i = 0; i < engine->deferred_count; i++)
		if (engine->deferred[i].space == fault->space &&
		    engine->deferred[i].address == fault->address &&
		    fault_kind(engine->deferred[i].flags) == fault_kind(fault->flags))
			return;
	if (engine->deferred_count == engine->deferred_capacity) {
		size_t capacity = engine->deferred_capacity ? 2 * engine->deferred_capacity : 64;
		struct deferred_fault *larger =
			grow(engine->deferred, engine->deferred_count * sizeof(*larger),
			     capacity * sizeof(*larger));

		if (!larger) {
			/* Cannot remember it, so let the kernel send it again. */
			uffd_shim_wake(fault->space->fd, fault->address & ~(BASE_PAGE - 1ull),
				       BASE_PAGE);
			return;
		}
		engine->deferred = larger;
		engine->deferred_capacity = capacity;
	}
	engine->deferred[engine->deferred_count++] = *fault;
}

/* Reading may fail for want of descriptors or memory; the message stays queued. */
static bool is_passing(int error)
{
	return error == -EMFILE || error == -ENFILE || error == -ENOMEM;
}

/* Returns false when it must be tried again later. */
static bool handle_fault(struct uffd_engine *engine, const struct deferred_fault *fault,
			 bool last_try)
{
	struct uffd_table *table = fault->space->table;
	unsigned int shard = uffd_table_enter(table, current_cpu());
	struct uffd_range *range = uffd_table_find(table, fault->address);
	enum uffd_fault_kind kind = fault_kind(fault->flags);
	enum outcome outcome = OUTCOME_GONE;
	uint64_t page;

	if (range) {
		page = page_of(range, fault->address);
		engine->fault_in_hand = fault;
		outcome = is_next_in_line(range, page, kind) ? fill_in_line(range, page)
							     : resolve_page(range, page, kind);
		engine->fault_in_hand = NULL;
		if (outcome == OUTCOME_RESOLVED)
			plan_prefetch(range, page, kind);
		/*
		 * Whoever is at this page wakes the waiters of its own space; those of
		 * a fork that shares the page must come back themselves.
		 */
		if (outcome == OUTCOME_IN_FLIGHT && range->content->shared &&
		    atomic_load(&engine->space_count) > 1)
			outcome = OUTCOME_DEFER;
		else if (outcome == OUTCOME_DEFER && last_try)
			outcome = apply_on_error(range, page, -EAGAIN, UFFD_FAILED_RESOLVE);
	} else {
		refuse_unserved(fault->space, fault->address);
	}
	uffd_table_leave(table, shard);
	if (outcome == OUTCOME_RESOLVED)
		note_fault(engine, fault->address, fault->flags, fault->thread_id,
			   fault->since_ns);
	return outcome != OUTCOME_DEFER;
}

void retry_deferred(struct uffd_engine *engine)
{
	uint64_t now = uffd_now_ns();
	size_t total = engine->deferred_count, kept = 0;

	for (size_t i = 0; i < total; i++) {
		struct deferred_fault fault = engine->deferred[i];
		bool last_try = now - fault.since_ns > engine->options.retry_limit_ns;

		count(engine, COUNTER(retried), 1);
		if (!handle_fault(engine, &fault, last_try))
			engine->deferred[kept++] = fault;
	}
	engine->deferred_count = kept;
}

/* Read until the queue is empty; a short read says that it is. */
static int64_t drain(struct uffd_space *space)
{
	struct uffd_engine *engine = space->engine;
	size_t queued = 0;

	for (;;) {
		size_t room = engine->messages_capacity - queued;
		int64_t n = uffd_shim_read(space->fd, &engine->messages[queued],
					   room * sizeof(*engine->messages));
		struct uffd_msg *larger;

		if (n == -EAGAIN)
			return (int64_t)queued;
		if (n < 0)
			return n;
		queued += (uint64_t)n / sizeof(*engine->messages);
		if (queued < engine->messages_capacity)
			return (int64_t)queued;
		larger = grow(engine->messages, queued * sizeof(*larger),
			      2 * queued * sizeof(*larger));
		if (!larger)
			return (int64_t)queued;
		engine->messages = larger;
		engine->messages_capacity = 2 * queued;
	}
}

static int64_t drain_and_apply(struct uffd_space *space)
{
	struct uffd_engine *engine = space->engine;
	int64_t queued;

	gate_close(space);
	queued = drain(space);
	if (queued > 0) {
		uffd_barrier(UFFD_BARRIER_STEP_READ);
		/* Layout events first: a fault may be read before the event it comes after. */
		for (int64_t i = 0; i < queued; i++)
			if (engine->messages[i].event != UFFD_EVENT_PAGEFAULT)
				apply_layout_event(space, &engine->messages[i]);
	}
	gate_leave(space);
	return queued;
}

static void step_space(struct uffd_space *space, uint32_t *handled)
{
	struct uffd_engine *engine = space->engine;
	int64_t queued = drain_and_apply(space);
	uint64_t now;

	if (queued < 0) {
		note_failure(engine, 0, 0, (int)queued, UFFD_FAILED_READ);
		if (is_passing((int)queued)) {
			sched_yield();
			return;
		}
		atomic_store(&space->gone, true);
		atomic_fetch_add(&engine->doomed_spaces, 1);
	}
	if (queued <= 0)
		return;
	uffd_barrier(UFFD_BARRIER_STEP_APPLIED);
	now = uffd_now_ns();
	for (int64_t i = 0; i < queued; i++) {
		const struct uffd_msg *message = &engine->messages[i];
		struct deferred_fault fault = {
			.space = space,
			.address = message->arg.pagefault.address,
			.flags = message->arg.pagefault.flags,
			.since_ns = now,
			.thread_id = message->arg.pagefault.ptid,
		};

		if (message->event != UFFD_EVENT_PAGEFAULT)
			continue;
		if (!handle_fault(engine, &fault, false)) {
			count(engine, COUNTER(deferred), 1);
			defer_fault(engine, &fault);
		}
	}
	count(engine, COUNTER(messages), (uint64_t)queued);
	*handled += (uint32_t)queued;
}

void uffd_engine_step(struct uffd_engine *engine, uint32_t *handled_ret)
{
	struct epoll_event ready[SPACES_AT_ONCE];
	int n;

	*handled_ret = 0;
	if (atomic_load(&engine->space_count) == 1) {
		if (!atomic_load(&engine->primary->gone))
			step_space(engine->primary, handled_ret);
		return;
	}
	n = epoll_wait(engine->epoll_fd, ready, SPACES_AT_ONCE, 0);
	for (int i = 0; i < n; i++)
		if (ready[i].data.ptr != &engine->wake_fd &&
		    ready[i].data.ptr != &engine->owner_pidfd)
			step_space(ready[i].data.ptr, handled_ret);
}
