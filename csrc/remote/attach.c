// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/page.h"
#include "remote/attach.h"
#include "remote/device.h"
#include "remote/frame.h"
#include "remote/inject.h"
#include "remote/trace.h"
#include "uffd_abi.h"

#define RED_ZONE 128u
#define FRAME_ALIGN 64u
/* The helper's page: its way out, and arguments of its system calls. */
#define HELPER_BYTES (UFFD_FRAME_MOST + BASE_PAGE)
#define ARGUMENTS_AT UFFD_FRAME_MOST
#define OWN_STACK (256u << 10)
#define USED_STACK (64u << 10)
#define HOLD_NS 1000000
/* What is begun is undone, also after the time for the whole is over. */
#define UNDO_NS 250000000
#define SYSCALL_BYTES 2u /* the length of the instruction */
#define XSTATE_MOST 16384u
#define PIDFD_THREAD O_EXCL /* Linux 6.9 */
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE 2u
#endif
#define EVERY_DESCRIPTOR UINT32_MAX

struct injection {
	struct uffd_attach *attach;
	pid_t creator;
	int32_t *fd_ret;
	struct uffd_inject calls;
	/* The thread that was stopped. */
	uint64_t mask;
	uint64_t home_sp;
	uint64_t scratch;
	uint64_t page;
	/* The helper's; the thread itself is calls.child. */
	uint64_t helper_sp;
	char saved[UFFD_FRAME_MOST];
	char frame[UFFD_FRAME_MOST];
	char xstate[XSTATE_MOST] __attribute__((aligned(64)));
};

/* Note how far it is, and wait if a test asks for that. */
static void reach(struct injection *in, enum uffd_attach_point point)
{
	struct timespec nap = { .tv_nsec = HOLD_NS };

	in->attach->point = point;
	if (in->attach->hold != (uint32_t)point || !point)
		return;
	__atomic_store_n(&in->attach->held, 1, __ATOMIC_SEQ_CST);
	while (getppid() == in->creator && __atomic_load_n(&in->attach->hold, __ATOMIC_SEQ_CST))
		nanosleep(&nap, NULL);
	in->calls.until_ns = uffd_now_ns() + in->attach->limit_ns;
}

/* Seize the thread, and stop it. */
static int stop(struct injection *in)
{
	struct uffd_attach *attach = in->attach;
	unsigned long options = PTRACE_O_TRACECLONE;
	int ret;

	if (attach->suspend_seccomp)
		options |= PTRACE_O_SUSPEND_SECCOMP;
	ret = uffd_trace_seize(attach->tid, options);
	if (ret)
		return ret;
	reach(in, UFFD_ATTACH_SEIZED);
	ret = uffd_trace_interrupt(attach->tid);
	if (!ret)
		ret = uffd_inject_wait(&in->calls, attach->tid, UFFD_TRACE_TRAP);
	if (!ret)
		reach(in, UFFD_ATTACH_STOPPED);
	return ret;
}

static int choose_scratch(struct injection *in)
{
	const struct uffd_attach *attach = in->attach;
	uint64_t below = (in->calls.regs.rsp - RED_ZONE - UFFD_FRAME_MOST) & ~(uint64_t)(FRAME_ALIGN - 1);

	in->scratch = attach->scratch;
	if (in->scratch)
		return 0;
	if (in->calls.regs.rsp > attach->stack_end || below < attach->stack_start)
		return -ENOTSUP;
	in->scratch = below;
	return 0;
}

static int write_home(struct injection *in)
{
	struct user_regs_struct home;
	uint64_t xstate_length = sizeof(in->xstate), length = 0;
	int ret = uffd_trace_get_regs(in->attach->tid, &in->calls.regs);

	if (!ret)
		ret = uffd_trace_get_mask(in->attach->tid, &in->mask);
	if (!ret)
		ret = uffd_trace_get_xstate(in->attach->tid, in->xstate, &xstate_length);
	if (!ret)
		ret = choose_scratch(in);
	if (!ret)
		ret = uffd_inject_get(in->attach->tid, in->scratch, in->saved, sizeof(in->saved));
	if (ret)
		return ret;
	home = in->calls.regs;
	uffd_frame_resume_at(&home);
	ret = uffd_frame_write(in->frame, in->scratch, in->attach->restorer, &home, in->mask,
			       in->xstate, xstate_length, &length, &in->home_sp);
	if (!ret)
		ret = uffd_inject_put(in->attach->tid, in->scratch, in->frame, length);
	if (!ret)
		reach(in, UFFD_ATTACH_FRAMED);
	return ret;
}

/* Map the helper's page; from now on the registers are not the thread's own. */
static int map_page(struct injection *in)
{
	const uint64_t arguments[5] = { in->attach->place, HELPER_BYTES, PROT_READ | PROT_WRITE,
					MAP_PRIVATE | MAP_ANONYMOUS, (uint64_t)-1 };
	struct user_regs_struct regs;
	int64_t found;
	int ret;

	uffd_inject_prepare(&in->calls, &regs, in->home_sp, SYS_mmap, arguments);
	ret = uffd_trace_set_regs(in->attach->tid, &regs);
	if (ret)
		return ret;
	reach(in, UFFD_ATTACH_REDIRECTED);
	/* Only now: the way home restores the mask. */
	ret = uffd_trace_set_mask(in->attach->tid, UINT64_MAX);
	if (ret)
		return ret;
	reach(in, UFFD_ATTACH_MASKED);
	found = uffd_inject_finish(&in->calls, in->attach->tid);
	if (found < 0)
		return (int)found;
	in->page = (uint64_t)found;
	reach(in, UFFD_ATTACH_MAPPED);
	return 0;
}

/* The helper's way out if it gets no further call: exit(0), with all signals blocked. */
static int prepare_helper(struct injection *in)
{
	static const uint64_t exit_arguments[5];
	struct user_regs_struct out;
	uint64_t length = 0;
	int ret;

	uffd_inject_prepare(&in->calls, &out, in->page + UFFD_FRAME_MOST, SYS_exit, exit_arguments);
	ret = uffd_frame_write(in->frame, in->page, in->attach->restorer, &out, UINT64_MAX, NULL, 0,
			       &length, &in->helper_sp);
	if (!ret)
		ret = uffd_inject_put(in->attach->tid, in->page, in->frame, length);
	if (!ret)
		reach(in, UFFD_ATTACH_PREPARED);
	return ret;
}

static int make_helper(struct injection *in)
{
	/* It leaves the table before it opens anything; copying the table may take long. */
	const uint64_t flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD |
			       CLONE_SYSVSEM;
	int64_t found = uffd_inject_call(&in->calls, in->attach->tid, in->home_sp, SYS_clone, flags,
					 in->helper_sp, 0, 0, 0);

	if (found < 0)
		return (int)found;
	if (!in->calls.child)
		return -EPROTO;
	reach(in, UFFD_ATTACH_CLONED);
	return uffd_inject_wait(&in->calls, in->calls.child, UFFD_TRACE_TRAP);
}

static int64_t helper_call(struct injection *in, long number, uint64_t a, uint64_t b, uint64_t c,
			   uint64_t d)
{
	return uffd_inject_call(&in->calls, in->calls.child, in->helper_sp, number, a, b, c, d, 0);
}

/* By the system call; where the target may not, by the device. */
static int64_t open_uffd(struct injection *in, int pidfd)
{
	int64_t found = helper_call(in, __NR_userfaultfd, (uint64_t)in->attach->flags, 0, 0, 0);

	if ((found == -EPERM || found == -EACCES || found == -ENOSYS) && in->attach->device >= 0) {
		in->attach->by_device = 1;
		found = uffd_device_open(&in->calls, in->helper_sp, in->page + ARGUMENTS_AT, pidfd,
					 in->attach->device, (uint64_t)in->attach->flags);
	}
	return found;
}

static int open_there(struct injection *in)
{
	int pidfd = (int)syscall(SYS_pidfd_open, in->calls.child, PIDFD_THREAD);
	int64_t found;
	int ret;

	if (pidfd < 0)
		return errno == EINVAL ? -EOPNOTSUPP : -errno;
	found = helper_call(in, SYS_close_range, 0, EVERY_DESCRIPTOR, CLOSE_RANGE_UNSHARE, 0);
	if (!found)
		found = open_uffd(in, pidfd);
	ret = found < 0 ? (int)found : 0;
	if (!ret) {
		reach(in, UFFD_ATTACH_OPENED);
		ret = uffd_inject_fetch(pidfd, found, in->fd_ret);
	}
	if (!ret)
		reach(in, UFFD_ATTACH_FETCHED);
	close(pidfd);
	return ret;
}

static void allow_undo(struct injection *in)
{
	uint64_t until_ns = uffd_now_ns() + UNDO_NS;

	if (in->calls.until_ns < until_ns)
		in->calls.until_ns = until_ns;
}

/*
 * Bring a thread to a stop at which it runs no system call, and would restart one.  One that was
 * given up may run still, or wait: for a CPU, or until its cgroup (version 2) is thawed.  It stops
 * for its tracer there, too.
 */
static int halt(struct injection *in, pid_t tid)
{
	struct user_regs_struct regs;
	bool is_stopped = !uffd_trace_get_regs(tid, &regs);
	int ret = uffd_trace_interrupt(tid);

	/*
	 * A stopped thread runs on to the stop it was asked for.  One that runs may be
	 * there already: do not send it on.
	 */
	if (!ret && is_stopped)
		ret = uffd_trace_resume(tid, 0);
	return ret ? ret : uffd_inject_wait(&in->calls, tid, UFFD_TRACE_TRAP);
}

/* With the seccomp filter suspended still. */
static int end_helper(struct injection *in, bool may_run)
{
	static const uint64_t arguments[5];
	struct uffd_trace_state state;
	struct user_regs_struct regs;
	int ret;

	allow_undo(in);
	if (may_run) {
		ret = halt(in, in->calls.child);
		if (ret)
			return ret;
	}
	uffd_inject_prepare(&in->calls, &regs, in->helper_sp, SYS_exit, arguments);
	ret = uffd_trace_set_regs(in->calls.child, &regs);
	while (!ret) {
		ret = uffd_trace_resume(in->calls.child, 0);
		if (!ret)
			ret = uffd_trace_wait(in->calls.child, in->calls.until_ns, &state);
	}
	if (ret != -ESRCH)
		return ret;
	in->calls.child = 0;
	reach(in, UFFD_ATTACH_ENDED);
	return 0;
}

/* Stop a thread that was given up; it may have mapped the page since. */
static int catch(struct injection *in)
{
	struct user_regs_struct regs;
	int ret = halt(in, in->attach->tid);

	if (!ret && in->attach->point < UFFD_ATTACH_MAPPED) {
		ret = uffd_trace_get_regs(in->attach->tid, &regs);
		if (!ret && regs.rip == in->calls.syscall_ret + SYSCALL_BYTES &&
		    regs.rax < (uint64_t)-BASE_PAGE)
			in->page = regs.rax;
	}
	return ret;
}

/* Return to where it was; tried whatever has failed before. */
static int restore(struct injection *in, bool may_run)
{
	pid_t tid = in->attach->tid;
	struct user_regs_struct regs = in->calls.regs;
	bool is_at_exit = false; /* of a system call */
	int ret = 0;

	allow_undo(in);
	if (may_run) {
		ret = catch(in);
		if (ret)
			return ret;
		allow_undo(in);
	}
	if (in->page) {
		int64_t r = uffd_inject_call(&in->calls, tid, in->home_sp, SYS_munmap, in->page,
					     HELPER_BYTES, 0, 0, 0);

		if (r == -ESRCH)
			return (int)r;
		is_at_exit = r == 0;
		reach(in, UFFD_ATTACH_UNMAPPED);
	}
	/*
	 * From a stop at which the kernel checks whether to restart a system call.  A thread
	 * that has none to restart continues from where it is.
	 */
	if (!is_at_exit || uffd_frame_restarts(&regs)) {
		allow_undo(in);
		ret = halt(in, tid);
		if (ret)
			return ret;
	}
	reach(in, UFFD_ATTACH_HALTED);
	/* The mask first: once the registers are restored nothing else would restore it. */
	ret = uffd_trace_set_mask(tid, in->mask);
	if (ret)
		return ret;
	reach(in, UFFD_ATTACH_UNMASKED);
	uffd_trace_restart(tid, &regs);
	ret = uffd_trace_set_regs(tid, &regs);
	if (ret)
		return ret;
	uffd_inject_put(in->attach->tid, in->scratch, in->saved, sizeof(in->saved));
	reach(in, UFFD_ATTACH_RESTORED);
	return 0;
}

static int inject(struct injection *in)
{
	uint64_t begin;
	bool redirected = false;
	int ret = stop(in), r;
	bool gave_up;

	if (ret)
		return ret;
	begin = uffd_now_ns();
	ret = write_home(in);
	if (!ret) {
		redirected = true;
		ret = map_page(in);
	}
	if (!ret)
		ret = prepare_helper(in);
	if (!ret)
		ret = make_helper(in);
	if (!ret)
		ret = open_there(in);
	gave_up = ret == -ETIMEDOUT;
	in->attach->error = ret ? in->attach->point : 0;
	/* A helper that cannot be ended keeps its page. */
	if (in->calls.child && (r = end_helper(in, gave_up))) {
		ret = ret ? ret : r;
		in->page = 0;
	}
	if (redirected && (r = restore(in, gave_up)))
		ret = ret ? ret : r;
	r = uffd_trace_detach(in->attach->tid);
	in->attach->stopped_ns = uffd_now_ns() - begin;
	if (!ret && !r)
		reach(in, UFFD_ATTACH_DONE);
	return ret ? ret : r;
}

static int child(void *argument)
{
	struct injection *in = argument;

	reach(in, UFFD_ATTACH_BEGIN);
	in->calls.until_ns = uffd_now_ns() + in->attach->limit_ns;
	in->attach->error = 0;
	in->attach->held = 0;
	return -inject(in);
}

int uffd_attach(struct uffd_attach *attach, int32_t *fd_ret)
{
	struct injection *in = malloc(sizeof(*in));
	char *stack = malloc(OWN_STACK);
	sigset_t all, before;
	int ret = in && stack ? 0 : -ENOMEM, status = 0;
	pid_t pid;

	*fd_ret = -1;
	if (!ret) {
		/* All that could delay us while the thread is stopped: page faults, and CPUID. */
		memset(stack + OWN_STACK - USED_STACK, 0, USED_STACK);
		memset(in, 0, sizeof(*in));
		uffd_frame_learn();
		in->attach = attach;
		in->calls.syscall_ret = attach->syscall_ret;
		in->fd_ret = fd_ret;
		in->creator = getpid();
		/* The child shares the data of signal handlers: none may run in it. */
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		/* No exit signal: no SIGCHLD handler and no waitpid(-1) notices it. */
		pid = clone(child, stack + OWN_STACK, CLONE_VM | CLONE_FILES | CLONE_VFORK, in);
		ret = pid < 0 ? -errno : 0;
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	if (!ret) {
		while (waitpid(pid, &status, __WCLONE) < 0 && errno == EINTR)
			;
		/* If it was killed, the kernel has detached the threads that it traced. */
		ret = WIFEXITED(status) ? -WEXITSTATUS(status) : -EINTR;
	}
	free(stack);
	free(in);
	return ret;
}
