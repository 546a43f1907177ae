// SPDX-License-Identifier: MIT
/*
 * The native driver: one C thread that runs the engine's step.  It takes no
 * Python lock, blocks all signals and stops through an eventfd.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "uffd_engine_internal.h"

/* Put-off faults are looked at again after this much, whatever else happens. */
#define DEFERRED_POLL_MS	1
/* With put-off faults, yield this often before sleeping: their cause may need our CPU. */
#define DEFERRED_YIELDS		64
#define DRAIN_CHECK_NS		200000
/* A queue is empty for sure once two whole passes found nothing. */
#define DRAIN_PASSES		2

/*
 * How long to spin for the next fault before blocking.  Waking an idle CPU costs
 * several times the fault itself, so spinning pays while faults come in quick
 * succession; every gap longer than the limit halves the time, down to nothing
 * when faults are rare.
 */
struct spin {
	uint64_t limit_ns;
	uint64_t now_ns;
};

static void note_gap(struct spin *spin, uint64_t gap_ns)
{
	if (gap_ns <= spin->limit_ns)
		spin->now_ns = spin->limit_ns;
	else
		spin->now_ns /= 2;
}

static void wait_for_work(struct uffd_engine *engine, int timeout_ms)
{
	struct pollfd fds[] = {
		{ .fd = engine->options.fd, .events = POLLIN },
		{ .fd = engine->wake_fd, .events = POLLIN },
	};
	uint64_t value;

	poll(fds, 2, timeout_ms);
	if (fds[1].revents & POLLIN)
		(void)!read(engine->wake_fd, &value, sizeof(value));
}

static void *native_main(void *argument)
{
	struct uffd_engine *engine = argument;
	struct spin spin = { engine->options.spin_ns, engine->options.spin_ns };
	uint64_t last_fault = uffd_now_ns();
	unsigned int yields = 0;

	while (!atomic_load(&engine->stop)) {
		uint32_t handled;
		uint64_t now;
		int r = uffd_engine_step(engine, &handled);

		if (r < 0) {
			note_failure(engine, 0, 0, r, UFFD_FAILED_READ);
			break;
		}
		if (handled) {
			now = uffd_now_ns();
			note_gap(&spin, now - last_fault);
			last_fault = now;
			yields = 0;
			if (spin.now_ns || engine->deferred_count || engine->job_count)
				continue;
		}
		if (engine->deferred_count) {
			retry_deferred(engine);
			if (engine->deferred_count && yields++ < DEFERRED_YIELDS)
				sched_yield();
			else if (engine->deferred_count)
				wait_for_work(engine, DEFERRED_POLL_MS);
			continue;
		}
		if (run_prefetch_slice(engine)) {
			last_fault = uffd_now_ns();
			continue;
		}
		if (!handled)
			atomic_fetch_add(&engine->idle_passes, 1);
		if (spin.now_ns && uffd_now_ns() - last_fault < spin.now_ns) {
			sched_yield();
			continue;
		}
		wait_for_work(engine, -1);
	}
	return NULL;
}

static int start_thread(struct uffd_engine *engine, const cpu_set_t *cpus)
{
	pthread_attr_t attributes;
	sigset_t all, old;
	char name[16];
	int r;

	pthread_attr_init(&attributes);
	if (cpus)
		pthread_attr_setaffinity_np(&attributes, sizeof(*cpus), cpus);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = pthread_create(&engine->thread, &attributes, native_main, engine);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attributes);
	if (r)
		return -r;
	snprintf(name, sizeof(name), "uffd-h%d", engine->options.fd);
	pthread_setname_np(engine->thread, name);
	return 0;
}

int uffd_native_start(struct uffd_engine *engine, const int32_t *cpus, uint32_t cpu_count)
{
	cpu_set_t set;
	int r;

	CPU_ZERO(&set);
	for (uint32_t i = 0; i < cpu_count; i++)
		CPU_SET((size_t)cpus[i], &set);
	engine->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (engine->wake_fd < 0)
		return -errno;
	atomic_store(&engine->stop, false);
	r = start_thread(engine, cpu_count ? &set : NULL);
	if (r) {
		close(engine->wake_fd);
		engine->wake_fd = -1;
		return r;
	}
	engine->thread_running = true;
	return 0;
}

static void kick(struct uffd_engine *engine)
{
	uint64_t one = 1;

	(void)!write(engine->wake_fd, &one, sizeof(one));
}

int uffd_native_drain(struct uffd_engine *engine, uint64_t limit_ns)
{
	uint64_t enough = atomic_load(&engine->idle_passes) + DRAIN_PASSES;
	uint64_t give_up = uffd_now_ns() + limit_ns;
	struct timespec pause = { .tv_nsec = DRAIN_CHECK_NS };

	if (!engine->thread_running)
		return 0;
	while (atomic_load(&engine->idle_passes) < enough) {
		if (uffd_now_ns() >= give_up)
			return -ETIMEDOUT;
		kick(engine);
		nanosleep(&pause, NULL);
	}
	return 0;
}

void uffd_native_stop(struct uffd_engine *engine)
{
	if (!engine->thread_running)
		return;
	atomic_store(&engine->stop, true);
	kick(engine);
	pthread_join(engine->thread, NULL);
	engine->thread_running = false;
	close(engine->wake_fd);
	engine->wake_fd = -1;
}
