// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "placement.h"
#include "base/clock.h"

#define TRIAL_FIRST	128
/* Trials get rarer as they fail. */
#define TRIAL_RAREST	(1u << 20)
/* The first faults on a new CPU find cold caches. */
#define TRIAL_SKIPPED	4
#define TRIAL_SAMPLES	20
#define MEAN_WEIGHT	32
/* No fault takes this long: the thread had to wait for its CPU. */
#define LATE_NS		1000000
/* A trial that met another thread predicts more of them. */
#define LATE_PENALTY	8
/* Contention: more than this part of the time was spent waiting for a CPU. */
#define CONTENDED_PART	16

static void stay_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static void stay_anywhere(struct uffd_placement *placement)
{
	sched_setaffinity(0, sizeof(placement->allowed), &placement->allowed);
	placement->cpu = -1;
}

static int next_cpu(const struct uffd_placement *placement)
{
	int here = sched_getcpu(), cpu = placement->tried;

	for (int i = 0; i < CPU_SETSIZE; i++) {
		cpu = (cpu + 1) % CPU_SETSIZE;
		if (cpu != here && CPU_ISSET((size_t)cpu, &placement->allowed))
			return cpu;
	}
	return -1;
}

/* Read a short file of /proc; false if that fails. */
static bool read_text(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got;

	if (fd < 0)
		return false;
	got = read(fd, text, size - 1);
	close(fd);
	text[got > 0 ? got : 0] = '\0';
	return got > 0;
}

static uint64_t read_delay_ns(void)
{
	unsigned long long running, waiting;
	char text[64];

	if (!read_text("/proc/thread-self/schedstat", text, sizeof(text)) ||
	    sscanf(text, "%llu %llu", &running, &waiting) != 2)
		return 0;
	return waiting;
}

/* Runnable threads of the whole machine; 0: unknown. */
static long runnable_threads(void)
{
	char text[64];
	long runnable;

	if (!read_text("/proc/loadavg", text, sizeof(text)) ||
	    sscanf(text, "%*s %*s %*s %ld/", &runnable) != 1)
		return 0;
	return runnable;
}

/* Whether others want the CPUs: by this thread's own waiting and the number of threads. */
static bool is_contended(struct uffd_placement *placement)
{
	uint64_t now = uffd_now_ns(), delay = read_delay_ns();
	uint64_t passed = now - placement->began_ns, waited = delay - placement->delay_ns;

	placement->began_ns = now;
	placement->delay_ns = delay;
	return waited > passed / CONTENDED_PART ||
	       runnable_threads() > sysconf(_SC_NPROCESSORS_ONLN);
}

static void begin_trial(struct uffd_placement *placement)
{
	int cpu = next_cpu(placement);

	placement->wait = placement->interval;
	if (cpu < 0)
		return;
	if (is_contended(placement)) {
		if (placement->cpu >= 0)
			stay_anywhere(placement);
		return;
	}
	placement->from = sched_getcpu();
	placement->tried = cpu;
	placement->samples = 0;
	placement->sum_ns = 0;
	stay_on(cpu);
}

static void go_back(struct uffd_placement *placement, uint32_t factor)
{
	stay_on(placement->from);
	if (placement->cpu < 0)
		stay_anywhere(placement);
	placement->interval = placement->interval > TRIAL_RAREST / factor
		? TRIAL_RAREST : placement->interval * factor;
	placement->wait = placement->interval;
	placement->from = -1;
}

static void end_trial(struct uffd_placement *placement)
{
	uint64_t mean = placement->sum_ns / TRIAL_SAMPLES;

	if (placement->samples < TRIAL_SKIPPED + TRIAL_SAMPLES ||
	    mean * 5 >= placement->mean_ns * 4) {
		go_back(placement, 2);
		return;
	}
	placement->cpu = placement->tried;
	placement->mean_ns = mean;
	placement->interval = TRIAL_FIRST;
	placement->wait = placement->interval;
	placement->from = -1;
}

void uffd_placement_init(struct uffd_placement *placement, bool free)
{
	*placement = (struct uffd_placement){
		.free = free,
		.cpu = -1,
		.from = -1,
		.wait = TRIAL_FIRST,
		.interval = TRIAL_FIRST,
	};
}

void uffd_placement_begin(struct uffd_placement *placement)
{
	if (sched_getaffinity(0, sizeof(placement->allowed), &placement->allowed))
		placement->free = false;
	placement->began_ns = uffd_now_ns();
	placement->delay_ns = read_delay_ns();
}

void uffd_placement_note(struct uffd_placement *placement, uint64_t gap_ns, uint64_t limit_ns)
{
	if (!placement->free)
		return;
	if (gap_ns > LATE_NS && placement->from >= 0) {
		placement->cpu = -1;
		go_back(placement, LATE_PENALTY);
		return;
	}
	if (gap_ns > LATE_NS && placement->cpu >= 0) {
		stay_anywhere(placement);
		placement->wait = placement->interval;
		return;
	}
	if (gap_ns > limit_ns)
		return;
	if (placement->from >= 0) {
		if (++placement->samples > TRIAL_SKIPPED)
			placement->sum_ns += gap_ns;
		if (placement->samples == TRIAL_SKIPPED + TRIAL_SAMPLES)
			end_trial(placement);
		return;
	}
	placement->mean_ns = placement->mean_ns
		? (placement->mean_ns * (MEAN_WEIGHT - 1) + gap_ns) / MEAN_WEIGHT : gap_ns;
	if (--placement->wait == 0)
		begin_trial(placement);
}

void uffd_placement_forget(struct uffd_placement *placement)
{
	if (!placement->free)
		return;
	if (placement->from >= 0)
		go_back(placement, 2);
	if (placement->cpu >= 0)
		stay_anywhere(placement);
}
