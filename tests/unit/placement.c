// SPDX-License-Identifier: MIT
/*
 * Run csrc/engine/placement.c on a machine that the caller makes up: its clock, CPUs and
 * load come from the commands on stdin.  Linked with --wrap for each call below.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "engine/placement.h"

#define CPUS	4

static uint64_t now, delay_ns;
static int here, moves;
static long runnable = 1;

int __wrap_clock_gettime(clockid_t id, struct timespec *ret)
{
	(void)id;
	*ret = (struct timespec){ (time_t)(now / 1000000000), (long)(now % 1000000000) };
	return 0;
}

int __wrap_sched_getcpu(void)
{
	return here;
}

int __wrap_sched_getaffinity(pid_t pid, size_t size, cpu_set_t *ret)
{
	(void)pid;
	memset(ret, 0, size);
	for (size_t cpu = 0; cpu < CPUS; cpu++)
		CPU_SET(cpu, ret);
	return 0;
}

int __wrap_sched_setaffinity(pid_t pid, size_t size, const cpu_set_t *set)
{
	(void)pid;
	(void)size;
	moves++;
	for (int cpu = 0; CPU_COUNT(set) == 1 && cpu < CPUS; cpu++)
		if (CPU_ISSET((size_t)cpu, set))
			here = cpu;
	return 0;
}

long __wrap_sysconf(int name)
{
	(void)name;
	return CPUS;
}

int __wrap_open(const char *path, int flags, ...)
{
	int fd = memfd_create("made up", 0);

	(void)flags;
	if (strstr(path, "loadavg"))
		dprintf(fd, "0.00 0.00 0.00 %ld/100 1\n", runnable);
	else
		dprintf(fd, "1 %llu 1\n", (unsigned long long)delay_ns);
	lseek(fd, 0, SEEK_SET);
	return fd;
}

int main(void)
{
	unsigned long long first, second, count;
	struct uffd_placement placement;
	char word[16];

	uffd_placement_init(&placement, true);
	uffd_placement_begin(&placement);
	while (scanf("%15s %llu %llu %llu", word, &first, &second, &count) == 4) {
		if (!strcmp(word, "runnable"))
			runnable = (long)first;
		else if (!strcmp(word, "delay"))
			delay_ns += first;
		else if (!strcmp(word, "sleep"))
			uffd_placement_forget(&placement);
		else
			for (; count; count--) {
				now += first;
				uffd_placement_note(&placement, first, second);
			}
		printf("%d %d %u %d\n", placement.from, placement.cpu, placement.interval, moves);
		fflush(stdout);
	}
	return 0;
}
