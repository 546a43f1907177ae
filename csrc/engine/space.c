// SPDX-License-Identifier: MIT
/* Address spaces and the pieces of memory served in them. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "alloc.h"
#include "core.h"

/* The last page of user memory: nobody registers it, so asking about it changes nothing. */
#define PROBE_ADDRESS	UINT64_C(0x7fffffffe000)
#define PROBE_LENGTH	UINT64_C(4096)
#define NS_PER_S	1000000000

/* A pidfd, so that nobody else is killed or watched who gets the number later. */
static int open_owner(struct uffd_space *space, const struct uffd_engine_options *options)
{
	space->is_here = space->owner_pid == getpid();
	space->owner_pidfd = -1;
	if (!space->owner_pid || space->is_here ||
	    (options->on_error != UFFD_ON_ERROR_KILL && !options->watch_owner))
		return 0;
	space->owner_pidfd = (int)syscall(SYS_pidfd_open, space->owner_pid, 0);
	if (space->owner_pidfd >= 0)
		return 0;
	if (errno != ESRCH || !space_is_dead(space))
		return -errno;
	atomic_store(&space->gone, true);
	return 0;
}

int space_create(struct uffd_engine *engine, int fd, bool owned, uint32_t event_features,
		 int32_t owner_pid, struct uffd_space **ret)
{
	struct uffd_space *space = uffd_alloc(sizeof(*space));
	int r;

	*ret = NULL;
	if (!space)
		return -ENOMEM;
	space->engine = engine;
	space->fd = fd;
	space->owned = owned;
	space->owner_pid = owner_pid;
	r = open_owner(space, &engine->options);
	if (r) {
		uffd_free(space);
		return r;
	}
	space->events = event_features;
	space->event_features = event_features;
	space->pagemap_fd = open_page_table(owner_pid);
	uffd_table_init(&space->own_table);
	space->table = engine->options.is_inline ? &uffd_inline_table : &space->own_table;
	atomic_store(&space->references, 1);

	pthread_mutex_lock(&engine->spaces_lock);
	space->number = engine->next_space++;
	LIST_INSERT_HEAD(&engine->spaces, space, link);
	atomic_fetch_add(&engine->space_count, 1);
	pthread_mutex_unlock(&engine->spaces_lock);
	*ret = space;
	return 0;
}

struct uffd_space *space_get(struct uffd_engine *engine, uint32_t number)
{
	struct uffd_space *space;

	pthread_mutex_lock(&engine->spaces_lock);
	LIST_FOREACH(space, &engine->spaces, link)
		if (space->number == number)
			break;
	if (space)
		atomic_fetch_add(&space->references, 1);
	pthread_mutex_unlock(&engine->spaces_lock);
	return space;
}

void space_put(struct uffd_space *space)
{
	if (atomic_fetch_sub(&space->references, 1) != 1)
		return;
	if (space->owned)
		close(space->fd);
	if (space->pagemap_fd >= 0)
		close(space->pagemap_fd);
	if (space->owner_pidfd >= 0)
		close(space->owner_pidfd);
	forget_owed(space, 0, UINT64_MAX);
	uffd_table_deinit(&space->own_table);
	uffd_free(space);
}

/* Take it off the list and drop what is left in its table. */
void space_retire(struct uffd_space *space)
{
	struct uffd_engine *engine = space->engine;
	struct uffd_range *range;

	report_gone(space);
	pthread_mutex_lock(&engine->spaces_lock);
	LIST_REMOVE(space, link);
	atomic_fetch_sub(&engine->space_count, 1);
	pthread_mutex_unlock(&engine->spaces_lock);
	while (space->table == &space->own_table && (range = uffd_table_next(space->table, 0))) {
		if (atomic_load(&space->gone))
			note_unsaved(range);
		range_remove(range);
	}
	space_put(space);
}

/* In slices, so that whoever waits can leave. */
#define GATE_WAIT_NS	20000000

bool gate_try_close(struct uffd_space *space)
{
	pthread_rwlock_t *gate = &space->engine->gate;
	struct timespec until;

	if (!has_gate(space) || pthread_rwlock_trywrlock(gate) == 0)
		return true;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += GATE_WAIT_NS;
	if (until.tv_nsec >= NS_PER_S) {
		until.tv_sec++;
		until.tv_nsec -= NS_PER_S;
	}
	return pthread_rwlock_timedwrlock(gate, &until) == 0;
}

bool gate_close(struct uffd_space *space)
{
	while (!gate_try_close(space))
		if (atomic_load(&space->engine->stop))
			return false;
	return true;
}

/*
 * A userfaultfd whose owner has exited says nothing of itself: poll stays silent
 * and WAKE succeeds (measured on Linux 6.18).  An ioctl that needs the memory
 * says ESRCH.
 */
bool space_is_dead(struct uffd_space *space)
{
	return atomic_load(&space->gone) ||
	       uffd_shim_writeprotect(space->fd, PROBE_ADDRESS, PROBE_LENGTH, 0) == -ESRCH;
}

bool layout_is_changing(struct uffd_space *space)
{
	return space->events && !atomic_load(&space->gone) &&
	       uffd_shim_writeprotect(space->fd, PROBE_ADDRESS, PROBE_LENGTH, 0) == -EAGAIN;
}

static bool owns_another_space(struct uffd_engine *engine, int32_t pid)
{
	struct uffd_space *space;

	pthread_mutex_lock(&engine->spaces_lock);
	LIST_FOREACH(space, &engine->spaces, link)
		if (space->owner_pid == pid)
			break;
	pthread_mutex_unlock(&engine->spaces_lock);
	return space;
}

/* No event says which process a fork is; the fault's message says which thread waits. */
static int kill_fork(struct uffd_space *space, uint32_t thread_id, uint64_t address)
{
	int32_t pid;
	int pidfd, r;

	if (!thread_id)
		return -ESRCH;
	r = uffd_owner_of_thread(thread_id, address, &pid, &pidfd);
	if (r)
		return r;
	if (pid == getpid() || owns_another_space(space->engine, pid))
		r = -EFAULT;
	else if (syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0))
		r = -errno;
	close(pidfd);
	return r;
}

int space_kill(struct uffd_space *space, uint32_t thread_id, uint64_t address)
{
	if (space->owned)
		return kill_fork(space, thread_id, address);
	if (space->is_here)
		return kill(getpid(), SIGKILL) ? -errno : 0;
	if (space->owner_pidfd < 0)
		return -ESRCH;
	return syscall(SYS_pidfd_send_signal, space->owner_pidfd, SIGKILL, NULL, 0) ? -errno : 0;
}

void wait_for_layout(struct uffd_space *space)
{
	uint64_t give_up = uffd_now_ns() + space->engine->options.retry_limit_ns;
	unsigned int attempt = 0;

	if (!atomic_load(&space->engine->thread_running))
		return;
	while (layout_is_changing(space) && uffd_now_ns() < give_up)
		uffd_back_off(attempt++);
}

struct uffd_range *range_create(struct uffd_space *space, const struct uffd_range *like,
				uint64_t start, uint64_t end, uint64_t origin)
{
	struct uffd_range *range = uffd_alloc(sizeof(*range));

	if (!range)
		return NULL;
	range->start = start;
	range->end = end;
	range->origin = origin;
	range->page_size = like->page_size;
	range->page_shift = like->page_shift;
	range->mode = like->mode;
	range->ioctls = __atomic_load_n(&like->ioctls, __ATOMIC_RELAXED);
	range->id = like->id;
	range->space = space;
	range->content = uffd_content_get(like->content);
	range->pages = uffd_pages_get(like->pages);
	atomic_store(&range->readahead_at, start);
	return range;
}

void range_free(struct uffd_range *range)
{
	uffd_content_put(range->content);
	uffd_pages_put(range->pages);
	uffd_free(range);
}

static bool is_in_use(struct uffd_engine *engine, struct uffd_range *range)
{
	return uffd_hold_is_on(&engine->holds, range) ||
	       (range->has_readers && !uffd_table_is_quiet(range->space->table));
}

void range_discard(struct uffd_range *range)
{
	struct uffd_engine *engine = range->space->engine;

	if (!is_in_use(engine, range)) {
		range_free(range);
		return;
	}
	atomic_fetch_add(&range->space->references, 1);
	pthread_mutex_lock(&engine->lost_lock);
	range->next_lost = engine->lost;
	engine->lost = range;
	pthread_mutex_unlock(&engine->lost_lock);
}

void range_remove(struct uffd_range *range)
{
	range->has_readers = !uffd_table_remove(range->space->table, range);
	range_discard(range);
}

bool free_lost(struct uffd_engine *engine)
{
	struct uffd_range **link = &engine->lost, *range;
	struct uffd_space *space;
	bool is_empty;

	pthread_mutex_lock(&engine->lost_lock);
	while ((range = *link)) {
		if (is_in_use(engine, range)) {
			link = &range->next_lost;
			continue;
		}
		*link = range->next_lost;
		space = range->space;
		range_free(range);
		space_put(space);
	}
	is_empty = !engine->lost;
	pthread_mutex_unlock(&engine->lost_lock);
	return is_empty;
}

static bool holds(const struct uffd_range *range, struct uffd_space *space, uint64_t id,
		  uint64_t offset)
{
	return range && range->space == space && range->id == id && offset >= range->origin &&
	       offset - range->origin < range->end - range->start;
}

struct uffd_range *find_piece(struct uffd_space *space, uint64_t id, uint64_t offset,
			      uint64_t hint)
{
	struct uffd_range *range = uffd_table_find(space->table, hint);

	if (holds(range, space, id, offset))
		return range;
	/* Moved: what follows is rare, and as slow as the table is long. */
	for (range = uffd_table_next(space->table, 0); range && !holds(range, space, id, offset);)
		range = uffd_table_next(space->table, range->end);
	return range;
}

struct uffd_range *any_piece(struct uffd_space *space, uint64_t id, uint64_t hint)
{
	struct uffd_range *range = uffd_table_find(space->table, hint);

	if (range && range->space == space && range->id == id)
		return range;
	for (range = uffd_table_next(space->table, 0);
	     range && (range->space != space || range->id != id);)
		range = uffd_table_next(space->table, range->end);
	return range;
}
