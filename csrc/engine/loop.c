// SPDX-License-Identifier: MIT
/*
 * The leader's loop: a step, deferred faults, prefetching, and sleep.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "drain.h"
#include "left.h"
#include "loop.h"
#include "pending.h"
#include "prefetch.h"
#include "space.h"
#include "stall.h"
#include "step.h"
#include "stray.h"
#include "base/clock.h"
#include "base/poll.h"

/* Retry deferred faults at least this often. */
#define DEFERRED_POLL_MS	1
/* With deferred faults, yield this often before sleeping: their cause may need our CPU. */
#define DEFERRED_YIELDS		64
/*
 * A yield that took so long let another thread run, which may go on for milliseconds: only a
 * wakeup interrupts it.  So sleep rather than spin for a while.
 */
#define YIELD_LOST_NS		100000u
#define SPIN_REST_NS		100000000u
/* Look for forks that have exited this often, and for some at each new fork. */
#define REAP_INTERVAL_NS	1000000000
#define REAP_AT_FORK		8
#define NS_PER_MS		1000000u
/* While something waits with a limit, wake this often to notice that the process was stopped. */
#define LOOK_MS			250u
/* A wait that ends this late: the process was stopped; a busy machine delays threads less. */
#define STOPPED_NS		500000000u
/* Check an exited owner's memory this often, for some milliseconds in all. */
#define EXIT_LOOKS		64

/*
 * Adapt how long to spin for the next fault before blocking.  Waking an idle CPU costs
 * several times the fault itself, so spinning pays while faults come in quick
 * succession.  Every gap longer than the limit halves the time, down to nothing when
 * faults are rare.
 */
static void note_gap(struct spin *spin, uint64_t now)
{
	if (now - spin->last_fault_ns <= spin->limit_ns)
		spin->now_ns = now < spin->rests_until_ns ? 0 : spin->limit_ns;
	else
		spin->now_ns /= 2;
	spin->last_fault_ns = now;
}

/* Whether to spin once more. */
static bool goes_on_spinning(struct spin *spin)
{
	uint64_t before = uffd_now_ns(), after;

	if (!spin->now_ns || before - spin->last_fault_ns >= spin->now_ns)
		return false;
	sched_yield();
	after = uffd_now_ns();
	if (after - before > YIELD_LOST_NS) {
		spin->now_ns = 0;
		spin->rests_until_ns = after + SPIN_REST_NS;
	}
	return true;
}

/* For the leader: forget a space whose memory no longer exists. */
static void forget_space(struct uffd_engine *engine, struct uffd_space *space)
{
	forget_faults(&engine->deferred, space);
	forget_faults(&engine->strays, space);
	forget_jobs(engine, space);
	epoll_ctl(engine->epoll_fd, EPOLL_CTL_DEL, space->fd, NULL);
	/* The engine's own space stays: serve and unserve still refer to it. */
	if (space != engine->primary)
		space_retire(space);
}

/* Check `most` spaces in turn for a dead owner, and retire the dead ones. */
static void reap_spaces(struct uffd_engine *engine, uint32_t most)
{
	struct uffd_space *space, *dead[SPACES_AT_ONCE];
	uint32_t doomed = atomic_exchange(&engine->doomed_spaces, 0);
	uint32_t total, asked = 0, found = 0, position = 0;

	if (atomic_load(&engine->space_count) == 1)
		return;
	pthread_mutex_lock(&engine->spaces_lock);
	total = atomic_load(&engine->space_count);
	LIST_FOREACH(space, &engine->spaces, link) {
		bool mine = (position++ + total - engine->reap_position % total) % total < most;

		if (space == engine->primary || found == SPACES_AT_ONCE)
			continue;
		if ((doomed && atomic_load(&space->gone)) ||
		    ((mine || atomic_load(&space->gone)) && ++asked && space_is_dead(space)))
			dead[found++] = space;
	}
	engine->reap_position += most;
	pthread_mutex_unlock(&engine->spaces_lock);
	while (found--)
		forget_space(engine, dead[found]);
}

/*
 * The process given as the owner has exited.  Continue serving if the memory still
 * exists: another process owns it, or shares it.  Retry, as a process that reads
 * another's memory keeps it alive for a moment.
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

	uffd_poll(fds, 3, timeout_ms);
	if (fds[0].revents & POLLIN)
		silence(engine->wake_fd);
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
		silence(engine->wake_fd);
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
		ms = lower(due > now ? (due - now) / NS_PER_MS + 1 : 0, LOOK_MS);
	if (atomic_load(&engine->space_count) > 1 && ms > REAP_INTERVAL_NS / NS_PER_MS)
		ms = REAP_INTERVAL_NS / NS_PER_MS;
	if (atomic_load(&engine->vacated))
		ms = lower(ms, DEFERRED_POLL_MS);
	return ms == UINT64_MAX ? -1 : (int)ms;
}

/*
 * Wait for work.  If the wait ends far too late, the process was stopped (SIGSTOP, a
 * freezer, a debugger), and nobody could answer meanwhile: what waits gets its time again.
 */
static void sleep_for(struct uffd_engine *engine, int timeout_ms)
{
	uint64_t began = uffd_now_ns(), now;

	wait_for_work(engine, timeout_ms);
	if (timeout_ms < 0)
		return;
	now = uffd_now_ns();
	if (now - began > (uint64_t)timeout_ms * NS_PER_MS + STOPPED_NS)
		atomic_store(&engine->pause.ended_ns, now);
}

static bool hands_over(struct uffd_engine *engine, enum leader role)
{
	if (role == LEADER_WORKER)
		return atomic_load(&engine->queued_count);
	return engine->options.has_workers && atomic_load(&engine->idle_workers);
}

void run_loop(struct uffd_engine *engine, enum leader role)
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
		if (atomic_load(&engine->vacated))
			settle_all_vacated(engine);
		note_pass(engine);
		if (engine->forks_followed != forks)
			reap_spaces(engine, REAP_AT_FORK);
		if (handled) {
			uint64_t now = uffd_now_ns(), gap = now - spin->last_fault_ns;

			note_gap(spin, now);
			if (!engine->job_count)
				uffd_placement_note(placement, gap / handled, spin->limit_ns);
			yields = 0;
			/* Prefetch gets its turn between any two batches. */
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
				sleep_for(engine, DEFERRED_POLL_MS);
			continue;
		}
		if (run_prefetch_slice(engine)) {
			spin->last_fault_ns = uffd_now_ns();
			continue;
		}
		if (is_dismissed(engine))
			return;
		if (goes_on_spinning(spin))
			continue;
		if (hands_over(engine, role))
			break;
		uffd_placement_forget(placement);
		sleep_for(engine, idle_timeout_ms(engine));
	}
}

uint32_t uffd_engine_owner_exited(struct uffd_engine *engine)
{
	/* After the end no thread notices an exit. */
	bool is_unwatched = atomic_load(&engine->is_unwatched) ||
			    (engine->options.watch_owner && atomic_load(&engine->end.over));

	return atomic_load(&engine->owner_exited) ||
	       (is_unwatched && space_is_dead(engine->primary));
}
