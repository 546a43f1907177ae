// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>

#include "base/tasks.h"
#include "gil.h"

/* A thread that waits for the GIL wakes each 5 ms, and sleeps again: some 2 ms of CPU in 0.5 s. */
#define IDLE_TICKS	5u
#define LOOKS		50
#define PAUSE_NS	1000000

static struct {
	uint64_t start, end;
} runtime;

void uffd_gil_init(void)
{
	const ElfW(Sym) *symbol = NULL;
	void *address = dlsym(RTLD_DEFAULT, "_PyRuntime");
	Dl_info info;

	if (!address || !dladdr1(address, &info, (void **)&symbol, RTLD_DL_SYMENT) || !symbol)
		return;
	runtime.start = (uint64_t)(uintptr_t)address;
	runtime.end = runtime.start + symbol->st_size;
}

enum place { FOR_GIL, ON_CPU, ELSEWHERE };

static enum place place_of(int32_t thread_id)
{
	char text[256], *at;
	uint64_t address;

	if (uffd_task_read_thread(0, thread_id, "syscall", text, sizeof(text)) <= 0)
		return ELSEWHERE;
	if (!strncmp(text, "running", 7))
		return ON_CPU;
	if (strtol(text, &at, 10) != SYS_futex)
		return ELSEWHERE;
	address = strtoull(at, NULL, 16);
	return address >= runtime.start && address < runtime.end ? FOR_GIL : ELSEWHERE;
}

static uint64_t ticks_of(int32_t thread_id)
{
	unsigned long user, system;
	char text[1024];
	const char *at;

	if (uffd_task_read_thread(0, thread_id, "stat", text, sizeof(text)) < 0)
		return 0;
	at = strrchr(text, ')');
	if (!at || sscanf(at, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user,
			  &system) != 2)
		return 0;
	return user + system;
}

/* One that has just woken, and is about to sleep again, counts if it was seen before. */
static bool still_waits(const struct uffd_gil_wait *wait)
{
	return place_of(wait->thread_id) != ELSEWHERE &&
	       ticks_of(wait->thread_id) - wait->cpu_ticks <= IDLE_TICKS;
}

static bool note_for_gil(int32_t thread_id, void *argument)
{
	int32_t *found = argument;

	if (place_of(thread_id) == FOR_GIL)
		*found = thread_id;
	return !*found;
}

static int32_t find_any(void)
{
	int32_t found = 0;

	uffd_task_each_thread(0, note_for_gil, &found);
	return found;
}

bool uffd_gil_look(struct uffd_gil_wait *wait, int32_t thread_id, uint64_t now)
{
	if (wait->thread_id && (!thread_id || wait->thread_id == thread_id) && still_waits(wait))
		return true;
	memset(wait, 0, sizeof(*wait));
	if (!runtime.end)
		return false;
	if (!thread_id)
		thread_id = find_any();
	else if (place_of(thread_id) != FOR_GIL)
		return false;
	if (!thread_id)
		return false;
	*wait = (struct uffd_gil_wait){ thread_id, ticks_of(thread_id), now };
	return true;
}

bool uffd_gil_is_stuck(const struct uffd_gil_wait *wait)
{
	struct timespec pause = { .tv_nsec = PAUSE_NS };
	bool was_seen = false;

	if (!wait->thread_id)
		return false;

	for (int look = 0; look < LOOKS; look++) {
		enum place place = place_of(wait->thread_id);

		if (place == ELSEWHERE)
			return false;
		was_seen |= place == FOR_GIL;
		nanosleep(&pause, NULL);
	}
	return was_seen && still_waits(wait);
}
