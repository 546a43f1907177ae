// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/tasks.h"
#include "base/page.h"
#include "waiters.h"
#include "uffd_shim.h"

/* Where waiting threads sleep (wchan); compilers may append to the names. */
#define WAITS_FOR_PAGE	"handle_userfault"
#define WAITS_FOR_READ	"userfaultfd_event_wait"
/* The bounds of an address space (x86-64, unless more was asked for). */
#define LOWEST_ADDRESS	0x10000ull
#define HIGHEST_ADDRESS	0x7ffffffff000ull
/* Enough for about 40 wakes and repeated faults on a busy machine. */
#define SEARCH_LIMIT_NS	1000000000ull
#define PAUSE_NS	100000

static bool number_after(const char *text, const char *key, uint64_t *number_ret)
{
	const char *at = strstr(text, key);

	if (!at)
		return false;
	*number_ret = strtoull(at + strlen(key), NULL, 10);
	return true;
}

int uffd_waiters_fdinfo(int fd, struct uffd_fdinfo *info_ret)
{
	char path[48], text[1024];
	ssize_t n;

	snprintf(path, sizeof(path), "fdinfo/%d", fd);
	n = uffd_task_read(0, path, text, sizeof(text));
	if (n < 0)
		return (int)n;
	return number_after(text, "pending:", &info_ret->pending) &&
	       number_after(text, "total:", &info_ret->waiting) ? 0 : -EINVAL;
}

/* How often the thread went to sleep, and whether it sleeps now. */
static bool read_switches(int32_t pid, int32_t thread_id, uint64_t *switches_ret,
			  bool *sleeps_ret)
{
	char text[2048];
	const char *state;

	if (uffd_task_read_thread(pid, thread_id, "status", text, sizeof(text)) < 0)
		return false;
	state = strstr(text, "State:\t");
	*sleeps_ret = state && (state[7] == 'S' || state[7] == 'D');
	return state && number_after(text, "\nvoluntary_ctxt_switches:", switches_ret);
}

/* Count completed faults, not those interrupted or woken without a page. */
static bool read_faults(int32_t pid, int32_t thread_id, uint64_t *faults_ret)
{
	unsigned long minor, major;
	char text[1024];
	const char *at;

	if (uffd_task_read_thread(pid, thread_id, "stat", text, sizeof(text)) < 0)
		return false;
	at = strrchr(text, ')');
	if (!at || sscanf(at, ") %*c %*d %*d %*d %*d %*d %*u %lu %*u %lu", &minor, &major) != 2)
		return false;
	*faults_ret = minor + major;
	return true;
}

static bool waits_for(int32_t pid, int32_t thread_id, const char *where)
{
	char text[64];

	return uffd_task_read_thread(pid, thread_id, "wchan", text, sizeof(text)) > 0 &&
	       !strncmp(text, where, strlen(where));
}

static bool look_at(int32_t pid, int32_t thread_id, struct uffd_waiter *waiter_ret)
{
	bool sleeps;

	waiter_ret->thread_id = thread_id;
	waiter_ret->low = waiter_ret->high = 0;
	if (waits_for(pid, thread_id, WAITS_FOR_PAGE)) {
		waiter_ret->is_event = false;
		return read_faults(pid, thread_id, &waiter_ret->mark);
	}
	waiter_ret->is_event = true;
	return waits_for(pid, thread_id, WAITS_FOR_READ) &&
	       read_switches(pid, thread_id, &waiter_ret->mark, &sleeps);
}

bool uffd_waiters_is_same(int32_t pid, const struct uffd_waiter *waiter, bool was_woken)
{
	struct uffd_waiter now;

	/* It may not sleep again yet. */
	if (was_woken && !waiter->is_event)
		return read_faults(pid, waiter->thread_id, &now.mark) && now.mark == waiter->mark;
	return look_at(pid, waiter->thread_id, &now) && now.is_event == waiter->is_event &&
	       now.mark == waiter->mark;
}

struct search {
	struct uffd_waiter *waiters;
	uint32_t found, capacity;
	int32_t pid;
};

static bool note_waiter(int32_t thread_id, void *argument)
{
	struct search *search = argument;

	if (look_at(search->pid, thread_id, &search->waiters[search->found]))
		search->found++;
	return search->found < search->capacity;
}

uint32_t uffd_waiters_find(int32_t pid, struct uffd_waiter *waiters_ret, uint32_t capacity)
{
	struct search search = { waiters_ret, 0, capacity, pid };

	if (capacity)
		uffd_task_each_thread(pid, note_waiter, &search);
	return search.found;
}

enum answer { WAS_WOKEN, SLEPT_ON, CANNOT_TELL };

/* Wait until the thread sleeps in its fault again. */
static bool settle(int32_t pid, int32_t thread_id, uint64_t give_up, uint64_t *switches_ret)
{
	struct timespec pause = { .tv_nsec = PAUSE_NS };
	bool sleeps;

	while (uffd_now_ns() < give_up) {
		if (!read_switches(pid, thread_id, switches_ret, &sleeps))
			return false;
		if (sleeps && waits_for(pid, thread_id, WAITS_FOR_PAGE))
			return true;
		nanosleep(&pause, NULL);
	}
	return false;
}

static enum answer wake(int fd, int32_t pid, int32_t thread_id, uint64_t start, uint64_t end,
			uint64_t give_up)
{
	struct timespec pause = { .tv_nsec = PAUSE_NS };
	uint64_t before, after;
	bool sleeps;

	if (!settle(pid, thread_id, give_up, &before) ||
	    uffd_shim_wake(fd, start, end - start))
		return CANNOT_TELL;
	/* Twice: a thread about to sleep again looks asleep before that sleep is counted. */
	for (int look = 0; look < 2; look++) {
		if (look)
			nanosleep(&pause, NULL);
		if (!read_switches(pid, thread_id, &after, &sleeps))
			return CANNOT_TELL;
		if (after != before || !sleeps)
			return WAS_WOKEN;
	}
	return SLEPT_ON;
}

/* Whether the thread waits for this userfaultfd at all; notes where its page is. */
static enum answer begin_search(int fd, int32_t pid, struct uffd_waiter *waiter, uint64_t low,
				uint64_t high, uint64_t give_up)
{
	enum answer answer = SLEPT_ON;

	if (low < high)
		answer = wake(fd, pid, waiter->thread_id, low, high, give_up);
	if (answer == SLEPT_ON) {
		low = LOWEST_ADDRESS;
		high = HIGHEST_ADDRESS;
		answer = wake(fd, pid, waiter->thread_id, low, high, give_up);
	}
	if (answer == WAS_WOKEN) {
		waiter->low = low;
		waiter->high = high;
	}
	return answer;
}

/* A signal may have woken the thread, too: begin again if the page is not the one found. */
static enum uffd_search confirm(int fd, int32_t pid, struct uffd_waiter *waiter, uint64_t give_up)
{
	uint64_t switches;

	switch (wake(fd, pid, waiter->thread_id, waiter->low, waiter->high, give_up)) {
	case WAS_WOKEN:
		/* It needs a CPU before it sleeps in the same fault again. */
		return settle(pid, waiter->thread_id, give_up, &switches) &&
		       uffd_waiters_is_same(pid, waiter, true) ? UFFD_SEARCH_FOUND
							 : UFFD_SEARCH_UNFINISHED;
	case SLEPT_ON:
		waiter->low = waiter->high = 0;
		return UFFD_SEARCH_UNFINISHED;
	default:
		return UFFD_SEARCH_UNFINISHED;
	}
}

enum uffd_search uffd_waiters_page(int fd, int32_t pid, struct uffd_waiter *waiter,
				   uint64_t low, uint64_t high)
{
	uint64_t give_up = uffd_now_ns() + SEARCH_LIMIT_NS;
	enum answer answer;

	if (!waiter->high) {
		answer = begin_search(fd, pid, waiter, low, high, give_up);
		if (answer != WAS_WOKEN)
			return answer == SLEPT_ON ? UFFD_SEARCH_OTHER : UFFD_SEARCH_UNFINISHED;
	}
	while (waiter->high - waiter->low > BASE_PAGE) {
		uint64_t half = (waiter->high - waiter->low) / 2 / BASE_PAGE * BASE_PAGE;
		uint64_t middle = waiter->low + half;

		answer = wake(fd, pid, waiter->thread_id, waiter->low, middle, give_up);
		if (answer == CANNOT_TELL)
			return UFFD_SEARCH_UNFINISHED;
		if (answer == WAS_WOKEN)
			waiter->high = middle;
		else
			waiter->low = middle;
	}
	return confirm(fd, pid, waiter, give_up);
}
