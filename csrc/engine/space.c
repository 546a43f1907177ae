// SPDX-License-Identifier: MIT
/* Address spaces and the pieces of memory served in them. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "alloc.h"
#include "expected.h"
#include "failures.h"
#include "page_table.h"
#include "range.h"
#include "registered.h"
#include "report.h"
#include "vacated.h"
#include "space.h"
#include "base/clock.h"
#include "uffd_owner.h"
#include "uffd_shim.h"

/* The last page of user memory: it is never registered, so probing it changes nothing. */
#define PROBE_ADDRESS	UINT64_C(0x7fffffffe000)
#define PROBE_LENGTH	UINT64_C(4096)

/* Use a pidfd, so that a process that reuses the pid is neither killed nor watched. */
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

int space_create(struct uffd_engine *engine, int fd, bool owned, uint32_t layout_events,
		 int32_t owner_pid, uint32_t number, struct uffd_space **ret)
{
	struct uffd_space *space = uffd_alloc(sizeof(*space));
	uint32_t next;
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
	space->layout_events = layout_events;
	space->pagemap_fd = open_page_table(owner_pid);
	uffd_table_init(&space->own_table);
	uffd_table_init(&space->registered);
	space->table = engine->table ? engine->table : &space->own_table;
	atomic_store(&space->references, 1);

	pthread_mutex_lock(&engine->spaces_lock);
	next = atomic_load(&engine->next_space);
	space->number = number == NEXT_NUMBER ? next : number;
	/* Another engine's spaces come in any order: number new ones from the highest. */
	if (next <= space->number)
		atomic_store(&engine->next_space, space->number + 1);
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
	drop_expected(space);
	drop_vacated(space);
	uffd_table_deinit(&space->own_table);
	free_registered(space);
	uffd_free(space);
}

void note_unsaved(struct uffd_range *range)
{
	uint64_t at = range->start;

	/* Pages that a fork shares live on in the space where they were served. */
	if (!range->content->preserve || range->space->owned)
		return;
	run_of(range, &at, range->end, UFFD_PAGE_CLEAN);
	if (at < range->end)
		note_failure(range->space->engine, at, range->page_size, -ESRCH, UFFD_FAILED_SAVE);
}

/* Take the space off the list and remove the ranges left in its table. */
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

/*
 * A userfaultfd does not report that its owner has exited: poll stays silent and WAKE
 * succeeds (measured on Linux 6.18).  An ioctl that needs the memory fails with ESRCH.
 */
bool space_is_dead(struct uffd_space *space)
{
	return atomic_load(&space->gone) ||
	       uffd_shim_writeprotect(space->fd, PROBE_ADDRESS, PROBE_LENGTH, 0) == -ESRCH;
}

bool layout_is_changing(struct uffd_space *space)
{
	return space->layout_events && !atomic_load(&space->gone) &&
	       uffd_shim_writeprotect(space->fd, PROBE_ADDRESS, PROBE_LENGTH, 0) == -EAGAIN;
}

bool layout_is_as(struct uffd_space *space, uint64_t moves)
{
	return atomic_load(&space->moves) == moves && !layout_is_changing(space);
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

/* No event names a fork's process; only the fault's message names the waiting thread. */
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

bool free_lost(struct uffd_engine *engine)
{
	struct uffd_range **link = &engine->lost, *range;
	struct uffd_space *space;
	bool is_empty;

	pthread_mutex_lock(&engine->lost_lock);
	while ((range = *link)) {
		if (range_is_in_use(range)) {
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

int watch_space(struct uffd_engine *engine, struct uffd_space *space)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = space };

	if (epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, space->fd, &event))
		return -errno;
	kick_leader(engine);
	return 0;
}
