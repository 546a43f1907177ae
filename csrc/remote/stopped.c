// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/array.h"
#include "base/clock.h"
#include "base/tasks.h"
#include "remote/stopped.h"
#include "remote/thread.h"
#include "remote/trace.h"

#define THREADS_FIRST 64u
/* PID_MAX_LIMIT of the kernel. */
#define TIDS_MOST (1 << 22)
#define WORD_BITS 64
#define HELPER_STACK (256u << 10)
/* How often the tracer looks whether its process runs, and how often it must find that it does not. */
#define LOOK_NS 10000000
#define LOOKS 5u

struct thread {
	pid_t tid;
	bool is_held;
};

struct uffd_stopped {
	pthread_t tracer;
	pid_t owner;
	/* Whether the threads were let go because the owner did not run. */
	_Atomic bool lost;
	bool ended;
	sem_t ready;
	sem_t wake;
	/* What the tracer is woken for; NULL: to let the threads go. */
	struct uffd_register_sets *wanted;
	const int32_t *pids;
	uint32_t pids_count;
	uint64_t until_ns;
	/* The same for a thread that waits in the kernel while others are stopped. */
	uint64_t asleep_until_ns;
	struct thread *threads;
	uint32_t count;
	uint64_t capacity;
	/* A bit for each possible thread: whether it is in `threads`. */
	uint64_t *known;
	int error;
	int32_t tid;
};

static bool is_known(const struct uffd_stopped *stopped, pid_t tid)
{
	return stopped->known[tid / WORD_BITS] >> tid % WORD_BITS & 1;
}

static int add(struct uffd_stopped *stopped, pid_t tid)
{
	int ret = uffd_array_grow((void **)&stopped->threads, &stopped->capacity,
				  stopped->count + 1, THREADS_FIRST, sizeof(*stopped->threads));

	if (ret)
		return ret;
	stopped->threads[stopped->count++] = (struct thread){ .tid = tid };
	stopped->known[tid / WORD_BITS] |= UINT64_C(1) << tid % WORD_BITS;
	return 0;
}

static void forget_all(struct uffd_stopped *stopped)
{
	for (; stopped->count; stopped->count--)
		stopped->known[stopped->threads[stopped->count - 1].tid / WORD_BITS] = 0;
}

/*
 * Seize and interrupt the threads of a process that are not known yet; found_ret: whether there were
 * any, or may be more.
 */
static int seize_new(struct uffd_stopped *stopped, int32_t pid, bool *found_ret)
{
	char path[40];
	struct dirent *entry;
	uint64_t listed = 0;
	DIR *folder;
	int ret = 0;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	folder = opendir(path);
	if (!folder)
		return errno == ENOENT ? -ESRCH : -errno;
	while (!ret && (entry = readdir(folder))) {
		pid_t tid = (pid_t)atoi(entry->d_name);

		if (tid <= 0 || tid >= TIDS_MOST)
			continue;
		listed++;
		if (is_known(stopped, tid))
			continue;
		ret = uffd_trace_seize(tid, 0);
		if (ret == -EPERM || ret == -ESRCH) {
			char state = uffd_thread_state(tid);

			/* One that has ended; the process continues without its first thread. */
			if (state == 'Z' || state == 'X') {
				ret = 0;
				listed -= state == 'X'; /* the kernel does not count it any more */
				continue;
			}
		}
		stopped->tid = tid;
		if (!ret)
			ret = uffd_trace_interrupt(tid);
		if (!ret)
			ret = add(stopped, tid);
		*found_ret = true;
	}
	if (listed < uffd_task_count(dirfd(folder)))
		*found_ret = true;
	closedir(folder);
	return ret;
}

/* Whether a thread waits in the kernel, uninterruptibly, while others are already stopped. */
static bool sleeps_too_long(const struct uffd_stopped *stopped, pid_t tid)
{
	if (uffd_now_ns() < stopped->asleep_until_ns || uffd_thread_state(tid) != 'D')
		return false;
	for (uint32_t i = 0; i < stopped->count; i++)
		if (stopped->threads[i].is_held)
			return true;
	return false;
}

static int wait_for(struct uffd_stopped *stopped, struct thread *thread)
{
	struct uffd_trace_state state;
	int ret;

	if (thread->is_held)
		return 0;
	stopped->tid = thread->tid;
	for (;;) {
		/* In short waits, to see what a thread that does not stop waits for. */
		uint64_t slice = uffd_now_ns() + 5000000;

		ret = uffd_trace_wait(thread->tid,
				      slice < stopped->until_ns ? slice : stopped->until_ns, &state);
		if (ret == -ETIMEDOUT && uffd_thread_waits_for_child(thread->tid))
			return 0;
		if (ret == -ETIMEDOUT && uffd_now_ns() < stopped->until_ns &&
		    !sleeps_too_long(stopped, thread->tid))
			continue;
		if (ret == -ESRCH) {
			thread->is_held = true; /* it has ended, which is as good */
			return 0;
		}
		if (ret)
			return ret;
		if (state.stop == UFFD_TRACE_TRAP) {
			thread->is_held = true;
			return 0;
		}
		/* A signal is pending: it is delivered, and the interruption comes after it. */
		ret = uffd_trace_resume(thread->tid,
					state.stop == UFFD_TRACE_SIGNAL ? state.signal : 0);
		if (ret)
			return ret;
	}
}

static int stop_all(struct uffd_stopped *stopped)
{
	bool found = true;
	int ret = 0;

	while (!ret && found) {
		found = false;
		for (uint32_t i = 0; !ret && i < stopped->pids_count; i++)
			ret = seize_new(stopped, stopped->pids[i], &found);
		for (uint32_t i = 0; !ret && i < stopped->count; i++)
			ret = wait_for(stopped, &stopped->threads[i]);
		if (!ret && uffd_now_ns() >= stopped->until_ns)
			ret = -ETIMEDOUT;
	}
	return ret;
}

/* The end of this thread would detach them too; this also undoes an EINTR that we caused. */
static void let_go(struct uffd_stopped *stopped)
{
	for (uint32_t i = 0; i < stopped->count; i++) {
		struct user_regs_struct regs, before;
		pid_t tid = stopped->threads[i].tid;

		if (!stopped->threads[i].is_held)
			continue;
		if (!uffd_trace_get_regs(tid, &regs)) {
			before = regs;
			uffd_trace_restart(tid, &regs);
			if (memcmp(&before, &regs, sizeof(regs)))
				uffd_trace_set_regs(tid, &regs);
		}
		uffd_trace_detach(tid);
	}
}

static int read_registers(struct uffd_stopped *stopped, struct uffd_register_sets *sets)
{
	int ret = 0;

	for (uint32_t i = 0; !ret && i < stopped->count; i++) {
		const struct thread *thread = &stopped->threads[i];

		stopped->tid = thread->tid;
		ret = thread->is_held ? uffd_registers_append(sets, thread->tid) :
					uffd_registers_append_waiting(sets, thread->tid);
		if (ret == -ESRCH)
			ret = 0;
	}
	return ret;
}

/* Threads that were killed: their parent, which may be the owner, sees it when the tracer has. */
static void reap_killed(struct uffd_stopped *stopped)
{
	for (uint32_t i = 0; i < stopped->count; i++) {
		struct thread *thread = &stopped->threads[i];
		siginfo_t info = { 0 };

		if (thread->is_held &&
		    !waitid(P_PID, (id_t)thread->tid, &info, WEXITED | WNOHANG | __WALL) &&
		    info.si_pid)
			thread->is_held = false;
	}
}

/* Wait until the owner wants something; 0, or -ETIMEDOUT: it does not run, so it cannot. */
static int wait_for_owner(struct uffd_stopped *stopped)
{
	unsigned int looks = 0;

	for (;;) {
		struct timespec until;
		char state;

		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_nsec += LOOK_NS;
		if (until.tv_nsec >= 1000000000) {
			until.tv_nsec -= 1000000000;
			until.tv_sec++;
		}
		if (!sem_timedwait(&stopped->wake, &until))
			return 0;
		if (errno != ETIMEDOUT)
			continue;
		reap_killed(stopped);
		/* A tracer of the owner (strace) stops it again and again, for a short time. */
		state = uffd_thread_state(stopped->owner);
		looks = state == 'T' || state == 't' ? looks + 1 : 0;
		if (looks >= LOOKS)
			return -ETIMEDOUT;
	}
}

static void hold(struct uffd_stopped *stopped)
{
	for (;;) {
		if (stopped->lost) {
			while (sem_wait(&stopped->wake))
				;
		} else if (wait_for_owner(stopped)) {
			stopped->lost = true;
			let_go(stopped);
			continue;
		}
		if (!stopped->wanted)
			break;
		stopped->error = stopped->lost ? -ETIMEDOUT :
						 read_registers(stopped, stopped->wanted);
		sem_post(&stopped->ready);
	}
	if (!stopped->lost)
		let_go(stopped);
}

/* Returns 0 when the threads have been let go, or why they were not stopped. */
static int trace(struct uffd_stopped *stopped)
{
	int ret;

	prctl(PR_SET_NAME, "uffd-stop");
	ret = stop_all(stopped);
	if (ret) {
		let_go(stopped);
		return ret;
	}
	stopped->error = 0;
	sem_post(&stopped->ready);
	hold(stopped);
	return 0;
}

/*
 * A separate process that shares the memory: a signal that stops the owner (SIGSTOP, SIGTSTP) does
 * not stop it, so that it can let the threads go.
 */
static int helper(void *argument)
{
	struct uffd_stopped *stopped = argument;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != stopped->owner)
		return 0;
	setsid();
	stopped->error = trace(stopped);
	return 0;
}

static void *run(void *argument)
{
	struct uffd_stopped *stopped = argument;
	char *stack = malloc(HELPER_STACK);
	pid_t pid = -1;

	prctl(PR_SET_NAME, "uffd-stop");
	stopped->error = -EPERM;
	/* This thread waits until it has ended, so that it can use this thread's local variables. */
	if (stack)
		pid = clone(helper, stack + HELPER_STACK,
			    CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_VFORK, stopped);
	if (pid > 0)
		while (waitpid(pid, NULL, __WCLONE) < 0 && errno == EINTR)
			;
	free(stack);
	if (stopped->error == -EPERM) {
		/* Yama lets only ancestors trace, which the helper is not. */
		forget_all(stopped);
		stopped->error = trace(stopped);
	}
	if (stopped->error)
		sem_post(&stopped->ready);
	return NULL;
}

static void destroy(struct uffd_stopped *stopped)
{
	sem_destroy(&stopped->ready);
	sem_destroy(&stopped->wake);
	free(stopped->threads);
	free(stopped->known);
	free(stopped);
}

int uffd_stopped_create(const int32_t *pids, uint32_t count, uint64_t limit_ns,
			uint64_t asleep_limit_ns, struct uffd_stopped **stopped_ret, int32_t *tid_ret,
			uint32_t *threads_ret, uint64_t *ns_ret)
{
	struct uffd_stopped *stopped = calloc(1, sizeof(*stopped));
	uint64_t begin = uffd_now_ns();
	sigset_t all, before;
	int ret;

	*stopped_ret = NULL;
	*tid_ret = 0;
	*threads_ret = 0;
	*ns_ret = 0;
	if (!stopped)
		return -ENOMEM;
	/* Only the pages that are written are there. */
	stopped->known = calloc(TIDS_MOST / WORD_BITS, sizeof(*stopped->known));
	if (!stopped->known) {
		free(stopped);
		return -ENOMEM;
	}
	stopped->pids = pids;
	stopped->pids_count = count;
	stopped->until_ns = begin + limit_ns;
	stopped->asleep_until_ns = begin + asleep_limit_ns;
	stopped->owner = getpid();
	sem_init(&stopped->ready, 0, 0);
	sem_init(&stopped->wake, 0, 0);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = -pthread_create(&stopped->tracer, NULL, run, stopped);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (ret) {
		destroy(stopped);
		return ret;
	}
	while (sem_wait(&stopped->ready))
		;
	*ns_ret = uffd_now_ns() - begin;
	*tid_ret = stopped->tid;
	*threads_ret = stopped->count;
	ret = stopped->error;
	if (ret) {
		pthread_join(stopped->tracer, NULL);
		destroy(stopped);
		return ret;
	}
	*stopped_ret = stopped;
	return 0;
}

int uffd_stopped_registers(struct uffd_stopped *stopped, struct uffd_register_sets *sets_ret)
{
	*sets_ret = (struct uffd_register_sets){ 0 };
	stopped->wanted = sets_ret;
	sem_post(&stopped->wake);
	while (sem_wait(&stopped->ready))
		;
	stopped->wanted = NULL;
	if (stopped->error)
		uffd_registers_free(sets_ret);
	return stopped->error;
}

int uffd_stopped_end(struct uffd_stopped *stopped)
{
	if (!stopped->ended) {
		stopped->ended = true;
		sem_post(&stopped->wake);
		pthread_join(stopped->tracer, NULL);
	}
	return stopped->lost ? -ETIMEDOUT : 0;
}

void uffd_stopped_release(struct uffd_stopped **stopped)
{
	if (!*stopped)
		return;
	uffd_stopped_end(*stopped);
	destroy(*stopped);
	*stopped = NULL;
}
