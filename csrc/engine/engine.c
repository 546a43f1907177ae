// SPDX-License-Identifier: MIT
/* Engines, made and unmade, and the address spaces they follow. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "alloc.h"
#include "core.h"

/* What an address space has at most (x86-64, unless it is asked for more), and at least. */
#define LOWEST_ADDRESS	0x10000ull
#define HIGHEST_ADDRESS	0x7ffffffff000ull

static bool init_descriptors(struct uffd_engine *engine)
{
	engine->wake_fd = engine->stop_fd = engine->watchdog_fd = engine->owner_pidfd = -1;
	engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	return engine->epoll_fd >= 0;
}

static void init_gate(struct uffd_engine *engine)
{
	pthread_rwlockattr_t attributes;

	/* Who waits to apply an event holds up a thread of the owner: before any filler. */
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&engine->gate, &attributes);
	pthread_rwlockattr_destroy(&attributes);
}

static void forget_parent(void)
{
	uffd_alloc_forget_parent();
	inline_forget_parent();
}

static void watch_forks(void)
{
	pthread_atfork(NULL, NULL, forget_parent);
}

int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret,
		       const char **call_ret)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct uffd_engine *engine;
	void *zeros;
	int r = -ENOMEM;

	*ret = NULL;
	*call_ret = "mmap";
	pthread_once(&once, watch_forks);
	engine = uffd_alloc(sizeof(*engine));
	if (!engine)
		return -ENOMEM;
	engine->options = *options;
	atomic_store(&engine->is_unwatched, !options->watch_owner);
	init_gate(engine);
	pthread_mutex_init(&engine->spaces_lock, NULL);
	pthread_mutex_init(&engine->requests_lock, NULL);
	pthread_mutex_init(&engine->await_lock, NULL);
	pthread_mutex_init(&engine->lost_lock, NULL);
	pthread_cond_init(&engine->requests_changed, NULL);
	pthread_cond_init(&engine->populates_changed, NULL);
	TAILQ_INIT(&engine->queued);
	TAILQ_INIT(&engine->taken);
	LIST_INIT(&engine->spaces);
	atomic_store(&engine->next_id, 1);
	pthread_mutex_init(&engine->keeper_lock, NULL);
	engine->shared = options->shared ? options->shared : uffd_alloc(sizeof(*engine->shared));
	zeros = mmap(NULL, ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	engine->zeros = zeros == MAP_FAILED ? NULL : zeros;
	if (!init_descriptors(engine)) {
		r = -errno;
		*call_ret = "epoll_create1";
	} else if (engine->shared && engine->zeros) {
		r = space_create(engine, options->fd, false, options->has_events,
				 options->owner_pid, &engine->primary);
		*call_ret = r == -ENOMEM ? NULL : "pidfd_open";
	}
	if (r == 0) {
		*call_ret = "epoll_ctl";
		r = watch_space(engine, engine->primary);
	}
	if (r) {
		uffd_engine_destroy(engine);
		return r;
	}
	*ret = engine;
	return 0;
}

/* Every range has been taken out, the driver has stopped, and nobody is inside. */
void uffd_engine_destroy(struct uffd_engine *engine)
{
	const void *huge_zeros = atomic_load(&engine->huge_zeros);
	struct uffd_space *space;

	free_lost(engine);
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
	pthread_cond_destroy(&engine->populates_changed);
	pthread_mutex_destroy(&engine->requests_lock);
	pthread_mutex_destroy(&engine->await_lock);
	pthread_mutex_destroy(&engine->lost_lock);
	pthread_mutex_destroy(&engine->spaces_lock);
	pthread_rwlock_destroy(&engine->gate);
	pthread_mutex_destroy(&engine->keeper_lock);
	uffd_free(engine->deferred.faults);
	uffd_free(engine->strays.faults);
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
			  int32_t owner_pid, uint32_t *space_ret)
{
	struct uffd_space *space;
	int r = space_create(engine, fd, false, has_events, owner_pid, &space);

	if (r)
		return r;
	*space_ret = space->number;
	r = watch_space(engine, space);
	if (r)
		space_retire(space);
	return r;
}

int uffd_engine_adopt_space(struct uffd_engine *engine, int fd, uint32_t is_fork,
			    uint32_t has_events, int32_t owner_pid, uint32_t number)
{
	struct uffd_space *space;
	int r;

	if (engine->next_space <= number)
		engine->next_space = number;
	r = space_create(engine, fd, is_fork, has_events, owner_pid, &space);
	if (r)
		return r;
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

static void wake_space(struct uffd_space *space)
{
	struct uffd_range *range;

	/* Also where nobody serves: all of the address space at once. */
	if (uffd_shim_wake(space->fd, LOWEST_ADDRESS, HIGHEST_ADDRESS - LOWEST_ADDRESS) == 0)
		return;
	gate_enter(space);
	for (range = uffd_table_next(space->table, 0); range;
	     range = uffd_table_next(space->table, range->end))
		uffd_shim_wake(space->fd, range->start, range->end - range->start);
	gate_leave(space);
}

void uffd_engine_wake_all(struct uffd_engine *engine)
{
	struct uffd_space *space;
	uint32_t last;

	pthread_mutex_lock(&engine->spaces_lock);
	last = engine->next_space;
	pthread_mutex_unlock(&engine->spaces_lock);
	/* Not under the lock: who closed the gate may want it. */
	for (uint32_t number = 0; number < last; number++) {
		space = space_get(engine, number);
		if (!space)
			continue;
		wake_space(space);
		space_put(space);
	}
}

int uffd_engine_remove_space(struct uffd_engine *engine, uint32_t number, uint64_t limit_ns)
{
	struct uffd_space *space = space_get(engine, number);
	uint64_t give_up = uffd_now_ns() + limit_ns;
	unsigned int attempt = 0;
	int r = 0;

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
		while (r == 0 && atomic_load(&space->references) > 1) {
			kick_leader(engine);
			uffd_back_off(attempt++);
			if (uffd_now_ns() > give_up)
				r = -EBUSY;
		}
	} else {
		epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, space->fd, NULL);
		space_retire(space);
	}
	space_put(space);
	return r;
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
	return atomic_load(&engine->owner_exited) ||
	       (atomic_load(&engine->is_unwatched) && space_is_dead(engine->primary));
}

/* For the leader: letting go of a space whose memory is no more. */
void forget_space(struct uffd_engine *engine, struct uffd_space *space)
{
	size_t kept = 0;

	forget_faults(&engine->deferred, space);
	forget_faults(&engine->strays, space);
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
