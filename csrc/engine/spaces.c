// SPDX-License-Identifier: MIT
/* Add, remove and wake address spaces of an engine. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "alloc.h"
#include "gate.h"
#include "space.h"
#include "spaces.h"
#include "base/clock.h"
#include "uffd_shim.h"

/* The bounds of an address space (x86-64, unless more was asked for). */
#define LOWEST_ADDRESS	0x10000ull
#define HIGHEST_ADDRESS	0x7ffffffff000ull

int space_add(struct uffd_engine *engine, int fd, bool owned, uint32_t layout_events,
	      int32_t owner_pid, uint32_t number, uint32_t *number_ret)
{
	struct uffd_space *space;
	int r = space_create(engine, fd, owned, layout_events, owner_pid, number, &space);

	if (r)
		return r;
	*number_ret = space->number;
	r = watch_space(engine, space);
	if (r)
		space_retire(space);
	return r;
}

int uffd_engine_add_space(struct uffd_engine *engine, int fd, uint32_t layout_events,
			  int32_t owner_pid, uint32_t *space_ret)
{
	return space_add(engine, fd, false, layout_events, owner_pid, NEXT_NUMBER, space_ret);
}

int list_forks(struct uffd_engine *engine, uint32_t **forks_ret, size_t *count_ret)
{
	struct uffd_space *space;
	size_t most;
	int r = 0;

	*forks_ret = NULL;
	*count_ret = 0;
	pthread_mutex_lock(&engine->spaces_lock);
	most = atomic_load(&engine->space_count);
	if (most > 1) {
		*forks_ret = uffd_alloc(most * sizeof(**forks_ret));
		if (!*forks_ret)
			r = -ENOMEM;
	}
	if (*forks_ret)
		LIST_FOREACH(space, &engine->spaces, link)
			if (space->owned && *count_ret < most)
				(*forks_ret)[(*count_ret)++] = space->number;
	pthread_mutex_unlock(&engine->spaces_lock);
	return r;
}

static void wake_space(struct uffd_space *space)
{
	struct uffd_range *range;

	/* Wake the whole address space at once, also memory that is not served. */
	if (uffd_shim_wake(space->fd, LOWEST_ADDRESS, HIGHEST_ADDRESS - LOWEST_ADDRESS) == 0)
		return;
	gate_enter(space);
	for (range = uffd_table_next(space->table, 0); range;
	     range = uffd_table_next(space->table, range->end))
		uffd_shim_wake(space->fd, range->start, range->end - range->start);
	gate_leave(space);
}

/*
 * Whether a thread waits whose fault has been read, by the kernel's counts; true if they
 * cannot be read.
 */
static bool has_read_faults(int fd)
{
	char path[40], text[512];
	const char *pending, *total;
	ssize_t n;
	int info;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = open(path, O_RDONLY | O_CLOEXEC);
	if (info < 0)
		return true;
	n = read(info, text, sizeof(text) - 1);
	close(info);
	text[n > 0 ? n : 0] = 0;
	pending = strstr(text, "pending:");
	total = strstr(text, "total:");
	return !pending || !total ||
	       strtoul(pending + strlen("pending:"), NULL, 10) !=
		       strtoul(total + strlen("total:"), NULL, 10);
}

static void wake_spaces(struct uffd_engine *engine, bool all)
{
	uint32_t last = atomic_load(&engine->next_space);
	struct uffd_space *space;

	/* Not under the lock: a thread that has closed the gate may wait for it. */
	for (uint32_t number = 0; number < last; number++) {
		space = space_get(engine, number);
		if (!space)
			continue;
		if (all || has_read_faults(space->fd))
			wake_space(space);
		space_put(space);
	}
}

void uffd_engine_wake_all(struct uffd_engine *engine)
{
	wake_spaces(engine, true);
}

void uffd_engine_wake_read(struct uffd_engine *engine)
{
	wake_spaces(engine, false);
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
		/* The leader may be using the space: let it do the removal. */
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

uint32_t uffd_engine_spaces(struct uffd_engine *engine)
{
	return atomic_load(&engine->space_count);
}
