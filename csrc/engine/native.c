// SPDX-License-Identifier: MIT
/*
 * The engine's own thread.  It takes no Python lock, blocks all signals and stops
 * through an eventfd.  Without workers it is always the leader; with workers, only
 * while none of them leads.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "loop.h"
#include "native.h"
#include "request.h"
#include "say.h"
#include "spaces.h"
#include "stray.h"
#include "base/clock.h"
#include "base/poll.h"
#include "base/threads.h"

/* A worker process and its holder are killed with the keeper; they end within this time. */
#define HELPERS_END_MS	1000

/* With workers: sleep until there has been no leader for a while, then lead. */
static void stand_by(struct uffd_engine *engine)
{
	struct pollfd fds[] = {
		{ .fd = engine->watchdog_fd, .events = POLLIN },
		{ .fd = engine->stop_fd, .events = POLLIN },
	};

	uffd_poll(fds, 2, -1);
	if (!(fds[0].revents & POLLIN))
		return;
	silence(engine->watchdog_fd);
	pthread_mutex_lock(&engine->requests_lock);
	if (leads_after_watchdog(engine)) {
		engine->leader = LEADER_NATIVE;
		pthread_mutex_unlock(&engine->requests_lock);
		run_loop(engine, LEADER_NATIVE);
		pthread_mutex_lock(&engine->requests_lock);
		engine->leader = LEADER_NONE;
		pthread_cond_signal(&engine->requests_changed);
	}
	pthread_mutex_unlock(&engine->requests_lock);
}

/*
 * Wait until the helper has ended, and nobody is left who could read a message and die with
 * it.  A process that a page source forked may hold the pipe open, too: do not wait for it.
 */
static void await_helper(struct uffd_engine *engine)
{
	struct pollfd fds[] = {
		{ .fd = engine->stop_fd, .events = POLLIN },
		{ .fd = engine->options.helper_pidfd, .events = POLLIN },
	};

	while (uffd_poll(fds, 2, -1) < 1)
		;
	if (atomic_load(&engine->stop))
		return;
	fds[1].fd = engine->options.helper_life;
	uffd_poll(fds, 2, HELPERS_END_MS);
	if (atomic_load(&engine->stop))
		return;
	say_helper_ended(engine);
	/* The kernel sends each fault once: those that the helper had read must come again. */
	uffd_engine_wake_all(engine);
}

static void *native_main(void *argument)
{
	struct uffd_engine *engine = argument;

	/* At the end the helper is given up, whether it has ended or not. */
	if (stands_in(engine) && !atomic_load(&engine->refusing))
		await_helper(engine);
	uffd_placement_begin(&engine->placement);
	while (!atomic_load(&engine->stop)) {
		if (engine->options.has_workers)
			stand_by(engine);
		else
			run_loop(engine, LEADER_NATIVE);
	}
	atomic_store_explicit(&engine->thread_done, true, memory_order_release);
	return NULL;
}

static int start_thread(struct uffd_engine *engine, const cpu_set_t *cpus)
{
	pthread_attr_t attributes;
	char name[16];
	int r;

	pthread_attr_init(&attributes);
	if (cpus)
		pthread_attr_setaffinity_np(&attributes, sizeof(*cpus), cpus);
	r = uffd_thread_start(&engine->thread, &attributes, native_main, engine);
	pthread_attr_destroy(&attributes);
	if (r)
		return r;
	snprintf(name, sizeof(name), "uffd-%c%d", stands_in(engine) ? 's' : 'h',
		 engine->options.fd);
	pthread_setname_np(engine->thread, name);
	return 0;
}

static int watch(struct uffd_engine *engine, int *fd, const char **call_ret)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = fd };

	if (*fd < 0)
		return -errno;
	*call_ret = "epoll_ctl";
	return epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, *fd, &event) ? -errno : 0;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void forget_owner(struct uffd_engine *engine)
{
	if (engine->owner_pidfd >= 0)
		epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, engine->owner_pidfd, NULL);
	engine->owner_pidfd = -1;
}

void native_close(struct uffd_engine *engine)
{
	close_fd(&engine->wake_fd);
	close_fd(&engine->stop_fd);
	close_fd(&engine->watchdog_fd);
	forget_owner(engine);
}

static bool has_descriptors(const struct uffd_engine *engine)
{
	return engine->wake_fd >= 0 && engine->stop_fd >= 0 && engine->watchdog_fd >= 0;
}

/* As they were when they were new. */
static void reset_descriptors(struct uffd_engine *engine)
{
	struct itimerspec never = { 0 };

	silence(engine->wake_fd);
	silence(engine->stop_fd);
	timerfd_settime(engine->watchdog_fd, 0, &never, NULL);
	silence(engine->watchdog_fd);
}

static int make_descriptors(struct uffd_engine *engine, const char **call_ret)
{
	int r;

	*call_ret = "eventfd2";
	engine->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	r = watch(engine, &engine->wake_fd, call_ret);
	if (r)
		return r;
	*call_ret = "eventfd2";
	engine->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (engine->stop_fd < 0)
		return -errno;
	*call_ret = "timerfd_create";
	engine->watchdog_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	return engine->watchdog_fd < 0 ? -errno : 0;
}

/* What stood by for a helper starts again when that is lost, maybe with RLIMIT_NOFILE reached. */
static int open_descriptors(struct uffd_engine *engine, const char **call_ret)
{
	int r;

	forget_owner(engine);
	if (has_descriptors(engine)) {
		reset_descriptors(engine);
	} else {
		native_close(engine);
		r = make_descriptors(engine, call_ret);
		if (r)
			return r;
	}
	if (!engine->options.watch_owner)
		return 0;
	/* A userfaultfd does not report its owner's exit; a pidfd does. */
	if (atomic_load(&engine->primary->gone)) {
		atomic_store(&engine->owner_exited, true);
		return 0;
	}
	engine->owner_pidfd = engine->primary->owner_pidfd;
	return watch(engine, &engine->owner_pidfd, call_ret);
}

int uffd_native_start(struct uffd_engine *engine, const int32_t *cpus, uint32_t cpu_count,
		      const char **call_ret)
{
	bool had_descriptors = has_descriptors(engine);
	cpu_set_t set;
	int r;

	/* An earlier call may have succeeded before an exception hid that from the caller. */
	if (atomic_load(&engine->thread_running))
		return 0;
	CPU_ZERO(&set);
	for (uint32_t i = 0; i < cpu_count; i++)
		CPU_SET((size_t)cpus[i], &set);
	engine->spin = (struct spin){ engine->options.spin_ns, engine->options.spin_ns,
				      uffd_now_ns(), 0 };
	/* A worker's thread is the caller's: do not pin it. */
	uffd_placement_init(&engine->placement, !cpu_count && engine->options.spin_ns &&
							!engine->options.has_workers);
	engine->leaves_strays = false;
	atomic_store(&engine->stop, false);
	atomic_store(&engine->thread_done, false);
	atomic_store(&engine->deferred_since_ns, UINT64_MAX);
	r = open_descriptors(engine, call_ret);
	if (r == 0) {
		*call_ret = "pthread_create";
		r = start_thread(engine, cpu_count ? &set : NULL);
	}
	if (!r)
		engine->thread_running = true;
	else if (!had_descriptors)
		native_close(engine);
	return r;
}

void native_end(struct uffd_engine *engine)
{
	atomic_store(&engine->stop, true);
	pthread_mutex_lock(&engine->requests_lock);
	pthread_cond_broadcast(&engine->requests_changed);
	pthread_cond_broadcast(&engine->populates_changed);
	pthread_mutex_unlock(&engine->requests_lock);
	kick_leader(engine);
	ring(engine->stop_fd);
}

void uffd_native_stop(struct uffd_engine *engine)
{
	if (!atomic_load(&engine->thread_running))
		return;
	native_end(engine);
	pthread_join(engine->thread, NULL);
	atomic_store(&engine->thread_running, false);
	refuse_strays(engine, true);
}
