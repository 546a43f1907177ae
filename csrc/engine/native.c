// SPDX-License-Identifier: MIT
/*
 * The loop of whoever leads, and the engine's own thread.  The thread takes no
 * Python lock, blocks all signals and stops through an eventfd.  Without workers
 * it leads all the time; with them, when none of them does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

/* Put-off faults are looked at again after this much, whatever else happens. */
#define DEFERRED_POLL_MS	1
/* With put-off faults, yield this often before sleeping: their cause may need our CPU. */
#define DEFERRED_YIELDS		64
#define DRAIN_CHECK_NS		200000
/* A queue is empty for sure once two whole passes found nothing. */
#define DRAIN_PASSES		2
/* Forks that have exited are looked for this often, some at each fork besides. */
#define REAP_INTERVAL_NS	1000000000
#define REAP_AT_FORK		8
#define NS_PER_MS		1000000u
/* How often an exited owner's memory is looked for, some milliseconds in all. */
#define EXIT_LOOKS		64

/*
 * How long to spin for the next fault before blocking.  Waking an idle CPU costs
 * several times the fault itself, so spinning pays while faults come in quick
 * succession; every gap longer than the limit halves the time, down to nothing
 * when faults are rare.
 */
static void note_gap(struct spin *spin, uint64_t now)
{
	if (now - spin->last_fault_ns <= spin->limit_ns)
		spin->now_ns = spin->limit_ns;
	else
		spin->now_ns /= 2;
	spin->last_fault_ns = now;
}

static void empty(int fd)
{
	uint64_t value;

	(void)!read(fd, &value, sizeof(value));
}

/*
 * The process said to own the memory has exited.  The memory is served on if it
 * lives: another process was meant, or shares it.  Whoever looks into a process
 * keeps its memory for a moment.
 */
static void owner_exits(struct uffd_engine *engine)
{
	epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, engine->owner_pidfd, NULL);
	engine->owner_pidfd = -1;
	for (unsigned int attempt = 0; !space_is_dead(engine->primary); attempt++) {
		if (attempt == EXIT_LOOKS) {
			atomic_store(&engine->is_unwatched, true);
			return;
		}
		uffd_back_off(attempt);
	}
	atomic_store(&engine->owner_exited, true);
	atomic_store(&engine->primary->gone, true);
	forget_space(engine, engine->primary);
}

static void wait_for_one(struct uffd_engine *engine, int timeout_ms)
{
	struct pollfd fds[] = {
		{ .fd = engine->wake_fd, .events = POLLIN },
		{ .fd = engine->owner_pidfd, .events = POLLIN },
		{ .fd = atomic_load(&engine->primary->gone) ? -1 : engine->options.fd,
		  .events = POLLIN },
	};

	poll(fds, 3, timeout_ms);
	if (fds[0].revents & POLLIN)
		empty(engine->wake_fd);
	if (fds[1].revents & POLLIN)
		owner_exits(engine);
}

static void wait_for_many(struct uffd_engine *engine, int timeout_ms)
{
	struct epoll_event ready;

	/* Only to sleep: the step asks again which spaces are ready. */
	if (epoll_wait(engine->epoll_fd, &ready, 1, timeout_ms) != 1)
		return;
	if (ready.data.ptr == &engine->wake_fd)
		empty(engine->wake_fd);
	else if (ready.data.ptr == &engine->owner_pidfd)
		owner_exits(engine);
}

static void wait_for_work(struct uffd_engine *engine, int timeout_ms)
{
	if (atomic_load(&engine->space_count) == 1)
		wait_for_one(engine, timeout_ms);
	else
		wait_for_many(engine, timeout_ms);
}

static void tend_spaces(struct uffd_engine *engine)
{
	uint64_t now;

	if (atomic_load(&engine->doomed_spaces))
		reap_spaces(engine, 0);
	if (atomic_load(&engine->space_count) == 1)
		return;
	now = uffd_now_ns();
	if (now - engine->last_reap_ns < REAP_INTERVAL_NS)
		return;
	engine->last_reap_ns = now;
	reap_spaces(engine, UINT32_MAX);
}

static int idle_timeout_ms(struct uffd_engine *engine)
{
	uint64_t due = fail_stalled_requests(engine), stray_due = refuse_strays(engine, false);
	uint64_t now = uffd_now_ns(), ms = UINT64_MAX;

	if (stray_due < due)
		due = stray_due;
	if (due != UINT64_MAX)
		ms = due > now ? (due - now) / NS_PER_MS + 1 : 0;
	if (atomic_load(&engine->space_count) > 1 && ms > REAP_INTERVAL_NS / NS_PER_MS)
		ms = REAP_INTERVAL_NS / NS_PER_MS;
	return ms == UINT64_MAX ? -1 : (int)ms;
}

static bool hands_over(struct uffd_engine *engine, enum leader role)
{
	if (role == LEADER_WORKER)
		return atomic_load(&engine->queued_count);
	return engine->options.has_workers && atomic_load(&engine->idle_workers);
}

void lead(struct uffd_engine *engine, enum leader role)
{
	struct spin *spin = &engine->spin;
	struct uffd_placement *placement = &engine->placement;
	unsigned int yields = 0;

	engine->leader_id = (uint32_t)syscall(SYS_gettid);
	while (!atomic_load(&engine->stop) && !hands_over(engine, role)) {
		uint64_t forks = engine->forks_followed;
		uint32_t handled;

		uffd_engine_step(engine, &handled);
		if (is_dismissed(engine))
			return;
		if (engine->forks_followed != forks)
			reap_spaces(engine, REAP_AT_FORK);
		if (handled) {
			uint64_t now = uffd_now_ns(), gap = now - spin->last_fault_ns;

			note_gap(spin, now);
			if (!engine->job_count)
				uffd_placement_note(placement, gap / handled, spin->limit_ns);
			yields = 0;
			/* A prefetch gets its turn between any two batches. */
			if (!engine->job_count && (spin->now_ns || engine->deferred.count))
				continue;
		}
		tend_spaces(engine);
		if (engine->strays.count)
			refuse_strays(engine, false);
		if (engine->deferred.count) {
			retry_deferred(engine);
			if (is_dismissed(engine))
				return;
			if (engine->deferred.count && yields++ < DEFERRED_YIELDS)
				sched_yield();
			else if (engine->deferred.count)
				wait_for_work(engine, DEFERRED_POLL_MS);
			continue;
		}
		if (run_prefetch_slice(engine)) {
			spin->last_fault_ns = uffd_now_ns();
			continue;
		}
		if (is_dismissed(engine))
			return;
		if (!handled && !atomic_load(&engine->outstanding))
			atomic_fetch_add(&engine->idle_passes, 1);
		if (spin->now_ns && uffd_now_ns() - spin->last_fault_ns < spin->now_ns) {
			sched_yield();
			continue;
		}
		if (hands_over(engine, role))
			break;
		uffd_placement_forget(placement);
		wait_for_work(engine, idle_timeout_ms(engine));
	}
}

/* With workers: sleep until nobody has led for a while. */
static void stand_by(struct uffd_engine *engine)
{
	struct pollfd fds[] = {
		{ .fd = engine->watchdog_fd, .events = POLLIN },
		{ .fd = engine->stop_fd, .events = POLLIN },
	};

	poll(fds, 2, -1);
	if (!(fds[0].revents & POLLIN))
		return;
	empty(engine->watchdog_fd);
	pthread_mutex_lock(&engine->requests_lock);
	if (leads_after_watchdog(engine)) {
		engine->leader = LEADER_NATIVE;
		pthread_mutex_unlock(&engine->requests_lock);
		lead(engine, LEADER_NATIVE);
		pthread_mutex_lock(&engine->requests_lock);
		engine->leader = LEADER_NONE;
		pthread_cond_signal(&engine->requests_changed);
	}
	pthread_mutex_unlock(&engine->requests_lock);
}

static void *native_main(void *argument)
{
	struct uffd_engine *engine = argument;

	uffd_placement_begin(&engine->placement);
	while (!atomic_load(&engine->stop)) {
		if (engine->options.has_workers)
			stand_by(engine);
		else
			lead(engine, LEADER_NATIVE);
	}
	atomic_store_explicit(&engine->thread_done, true, memory_order_release);
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

void native_close(struct uffd_engine *engine)
{
	close_fd(&engine->wake_fd);
	close_fd(&engine->stop_fd);
	close_fd(&engine->watchdog_fd);
	if (engine->owner_pidfd >= 0)
		epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, engine->owner_pidfd, NULL);
	engine->owner_pidfd = -1;
}

static int open_descriptors(struct uffd_engine *engine, const char **call_ret)
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
	if (engine->watchdog_fd < 0)
		return -errno;
	if (!engine->options.watch_owner)
		return 0;
	/* A userfaultfd does not say that its owner exits; a pidfd does. */
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
	cpu_set_t set;
	int r;

	/* Whoever started it may not know: an exception came after this had returned. */
	if (atomic_load(&engine->thread_running))
		return 0;
	native_close(engine);
	CPU_ZERO(&set);
	for (uint32_t i = 0; i < cpu_count; i++)
		CPU_SET((size_t)cpus[i], &set);
	engine->spin = (struct spin){ engine->options.spin_ns, engine->options.spin_ns,
				      uffd_now_ns() };
	/* A worker's thread is the caller's: it is left where it is. */
	uffd_placement_init(&engine->placement, !cpu_count && engine->options.spin_ns &&
							!engine->options.has_workers);
	engine->leaves_strays = false;
	atomic_store(&engine->stop, false);
	atomic_store(&engine->thread_done, false);
	r = open_descriptors(engine, call_ret);
	if (r == 0) {
		*call_ret = "pthread_create";
		r = start_thread(engine, cpu_count ? &set : NULL);
	}
	if (r)
		native_close(engine);
	else
		engine->thread_running = true;
	return r;
}

static void ring(int fd)
{
	uint64_t one = 1;

	if (fd >= 0)
		(void)!write(fd, &one, sizeof(one));
}

void kick_leader(struct uffd_engine *engine)
{
	ring(engine->wake_fd);
}

int uffd_native_drain(struct uffd_engine *engine, uint64_t limit_ns)
{
	uint64_t enough = atomic_load(&engine->idle_passes) + DRAIN_PASSES;
	uint64_t give_up = uffd_now_ns() + limit_ns;
	struct timespec pause = { .tv_nsec = DRAIN_CHECK_NS };

	if (!engine->thread_running)
		return 0;
	while (atomic_load(&engine->idle_passes) < enough) {
		if (uffd_now_ns() >= give_up || atomic_load(&engine->end.hurried))
			return -ETIMEDOUT;
		kick_leader(engine);
		nanosleep(&pause, NULL);
	}
	return 0;
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
