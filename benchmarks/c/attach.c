// SPDX-License-Identifier: MIT
/*
 * attach PID SYSCALL_RET FILE REPEATS: open a userfaultfd in another process, by the system calls
 * that pyuffd makes there, and close it again.
 *
 * SYSCALL_RET is the address of "syscall; ret" there.  The samples are the longest times that the
 * process was stopped, as noted in FILE (see tracked.c).  Signals are blocked meanwhile; if this
 * program is killed the other one is lost, which pyuffd does more to avoid.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define HELPER_BYTES 12288u
#define EVENT_STOP 128
#define PIDFD_THREAD O_EXCL
#define FEATURES (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED)

struct attach {
	pid_t pid;
	uint64_t syscall_ret;
	/* The longest time between two looks at the clock, and their number. */
	_Atomic uint64_t *seen;
	uint64_t repeats;
};

/* A stop comes within microseconds: do not sleep. Returns the status; 0 if the thread has ended. */
static int wait_for(pid_t tid)
{
	int status = 0;

	for (;;) {
		pid_t found = waitpid(tid, &status, __WALL | WNOHANG);

		if (found == tid)
			return WIFSTOPPED(status) ? status : 0;
		if (found < 0 && errno == ECHILD)
			return 0;
		if (found < 0 && errno != EINTR)
			die("waitpid");
		sched_yield();
	}
}

static void registers(pid_t tid, enum __ptrace_request request, struct user_regs_struct *regs)
{
	struct iovec vec = { regs, sizeof(*regs) };

	if (ptrace(request, tid, NT_PRSTATUS, &vec))
		die("registers");
}

/* Run to the next stop at a system call; returns a thread made on the way, or 0. */
static pid_t run_to_syscall(pid_t tid)
{
	unsigned long child = 0;

	for (;;) {
		int status;

		if (ptrace(PTRACE_SYSCALL, tid, 0, 0))
			die("PTRACE_SYSCALL");
		status = wait_for(tid);
		if (!status)
			die("the process has ended");
		if (WSTOPSIG(status) == (SIGTRAP | 0x80))
			return (pid_t)child;
		if (status >> 16 == PTRACE_EVENT_CLONE)
			ptrace(PTRACE_GETEVENTMSG, tid, 0, &child);
	}
}

static int64_t call(const struct attach *attach, pid_t tid, const struct user_regs_struct *own,
		    pid_t *child_ret, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
	struct user_regs_struct regs = *own;

	regs.rip = attach->syscall_ret;
	regs.rax = (uint64_t)number;
	regs.orig_rax = UINT64_MAX;
	regs.rdi = a;
	regs.rsi = b;
	regs.rdx = c;
	regs.r10 = d;
	regs.r8 = UINT64_MAX;
	regs.r9 = 0;
	registers(tid, PTRACE_SETREGSET, &regs);
	run_to_syscall(tid);
	*child_ret = run_to_syscall(tid);
	registers(tid, PTRACE_GETREGSET, &regs);
	return (int64_t)regs.rax;
}

static void end_helper(const struct attach *attach, pid_t helper, const struct user_regs_struct *own)
{
	struct user_regs_struct regs = *own;

	regs.rip = attach->syscall_ret;
	regs.rax = SYS_exit;
	regs.orig_rax = UINT64_MAX;
	regs.rdi = 0;
	registers(helper, PTRACE_SETREGSET, &regs);
	do {
		if (ptrace(PTRACE_SYSCALL, helper, 0, 0) && errno != ESRCH)
			die("PTRACE_SYSCALL");
	} while (wait_for(helper));
}

static int open_in(const struct attach *attach, const struct user_regs_struct *own, uint64_t page)
{
	const uint64_t flags = CLONE_VM | CLONE_FS | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
	pid_t helper, none;
	int64_t theirs;
	int pidfd, uffd;

	call(attach, attach->pid, own, &helper, SYS_clone, flags, page + HELPER_BYTES, 0, 0);
	if (!helper || !wait_for(helper))
		die("no thread was made");
	pidfd = (int)syscall(SYS_pidfd_open, helper, PIDFD_THREAD);
	if (pidfd < 0)
		die("pidfd_open");
	theirs = call(attach, helper, own, &none, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0, 0);
	uffd = (int)syscall(SYS_pidfd_getfd, pidfd, (int)theirs, 0);
	if (uffd < 0)
		die("pidfd_getfd, after userfaultfd returned %ld", (long)theirs);
	close(pidfd);
	end_helper(attach, helper, own);
	return uffd;
}

static int inject(const struct attach *attach)
{
	struct user_regs_struct own;
	uint64_t mask, all = UINT64_MAX;
	pid_t none;
	int64_t page;
	int uffd;

	if (ptrace(PTRACE_SEIZE, attach->pid, 0, PTRACE_O_TRACECLONE | PTRACE_O_TRACESYSGOOD) ||
	    ptrace(PTRACE_INTERRUPT, attach->pid, 0, 0) || !wait_for(attach->pid))
		die("stopping process %d", attach->pid);
	registers(attach->pid, PTRACE_GETREGSET, &own);
	if (ptrace(PTRACE_GETSIGMASK, attach->pid, sizeof(mask), &mask) ||
	    ptrace(PTRACE_SETSIGMASK, attach->pid, sizeof(all), &all))
		die("signal mask");
	page = call(attach, attach->pid, &own, &none, SYS_mmap, 0, HELPER_BYTES,
		    PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS);
	if (page < 0)
		die("mmap returned %ld", (long)page);
	uffd = open_in(attach, &own, (uint64_t)page);
	if (call(attach, attach->pid, &own, &none, SYS_munmap, (uint64_t)page, HELPER_BYTES, 0, 0))
		die("munmap");
	if (ptrace(PTRACE_SETSIGMASK, attach->pid, sizeof(mask), &mask))
		die("signal mask");
	registers(attach->pid, PTRACE_SETREGSET, &own);
	if (ptrace(PTRACE_DETACH, attach->pid, 0, 0))
		die("PTRACE_DETACH");
	return uffd;
}

/* The time for which it was stopped, once it has looked at the clock again. */
static uint64_t stood(const struct attach *attach)
{
	uint64_t looks = attach->seen[1];

	while (attach->seen[1] < looks + 2)
		sched_yield();
	return attach->seen[0];
}

static uint64_t run_round(void *context, uint64_t *samples)
{
	const struct attach *attach = context;
	uint64_t begin_ns = now_ns();

	for (uint64_t i = 0; i < attach->repeats; i++) {
		struct uffdio_api api = { .api = UFFD_API, .features = FEATURES };
		int uffd;

		attach->seen[0] = 0;
		uffd = inject(attach);
		if (ioctl(uffd, UFFDIO_API, &api))
			die("UFFDIO_API");
		close(uffd);
		samples[i] = stood(attach);
	}
	return now_ns() - begin_ns;
}

int main(int argc, char **argv)
{
	struct attach attach;
	int fd;

	if (argc != 5)
		die("usage: attach PID SYSCALL_RET FILE REPEATS");
	attach.pid = atoi(argv[1]);
	attach.syscall_ret = strtoull(argv[2], NULL, 10);
	attach.repeats = strtoull(argv[4], NULL, 10);
	fd = open(argv[3], O_RDWR | O_CLOEXEC);
	if (fd < 0)
		die("%s", argv[3]);
	attach.seen = mmap(NULL, 2 * sizeof(*attach.seen), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (attach.seen == MAP_FAILED)
		die("mmap of %s", argv[3]);
	serve_rounds(run_round, &attach, attach.repeats);
	return 0;
}
