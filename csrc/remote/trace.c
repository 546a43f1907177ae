// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#include "base/clock.h"
#include "remote/trace.h"

#define SYSCALL_TRAP (SIGTRAP | 0x80)
#define EVENT_STOP 128 /* PTRACE_EVENT_STOP, which <sys/ptrace.h> has only since glibc 2.26 */
/* A stop comes within microseconds; after that its thread waits for a CPU, or does not stop. */
#define SPIN_NS 300000
#define NAP_NS 50000
#define PEEKED 8 /* pending signals read at once */

static int result(long r)
{
	return r < 0 ? -errno : 0;
}

int uffd_trace_seize(pid_t tid, unsigned long options)
{
	return result(ptrace(PTRACE_SEIZE, tid, 0, options | PTRACE_O_TRACESYSGOOD));
}

int uffd_trace_interrupt(pid_t tid)
{
	return result(ptrace(PTRACE_INTERRUPT, tid, 0, 0));
}

int uffd_trace_resume(pid_t tid, int signal)
{
	return result(ptrace(PTRACE_SYSCALL, tid, 0, (long)signal));
}

int uffd_trace_detach(pid_t tid)
{
	return result(ptrace(PTRACE_DETACH, tid, 0, 0));
}

int uffd_trace_allow(int32_t pid)
{
	/* EINVAL: a kernel without Yama, which restricts nobody. */
	return prctl(PR_SET_PTRACER, pid) && errno != EINVAL ? -errno : 0;
}

static void classify(pid_t tid, int status, struct uffd_trace_state *state)
{
	int event = status >> 16;
	unsigned long message = 0;

	*state = (struct uffd_trace_state){ .stop = UFFD_TRACE_OTHER, .signal = WSTOPSIG(status) };
	if (event == EVENT_STOP) {
		state->stop = UFFD_TRACE_TRAP;
	} else if (event == PTRACE_EVENT_CLONE) {
		state->stop = UFFD_TRACE_CLONE;
		if (!ptrace(PTRACE_GETEVENTMSG, tid, 0, &message))
			state->child = (pid_t)message;
	} else if (!event) {
		state->stop = state->signal == SYSCALL_TRAP ? UFFD_TRACE_SYSCALL : UFFD_TRACE_SIGNAL;
	}
}

/* Also if another thread of this process has consumed the notification with waitpid(-1). */
static bool is_trapped(pid_t tid, struct uffd_trace_state *state)
{
	siginfo_t info;
	bool is_ours;
	int status;

	if (ptrace(PTRACE_GETSIGINFO, tid, 0, &info))
		return false;
	/* A stop of ptrace's own has the code that waitpid() would have returned. */
	is_ours = info.si_code > 0x7f && (info.si_code & 0x7f) == info.si_signo;
	waitpid(tid, &status, __WALL | WNOHANG);
	classify(tid, (is_ours ? info.si_code : info.si_signo) << 8 | 0x7f, state);
	return true;
}

int uffd_trace_wait(pid_t tid, uint64_t until_ns, struct uffd_trace_state *state_ret)
{
	uint64_t begin = uffd_now_ns();

	for (;;) {
		struct timespec nap = { .tv_nsec = NAP_NS };
		int status = 0;
		pid_t found = waitpid(tid, &status, __WALL | WNOHANG);
		uint64_t now;

		if (found < 0 && errno != EINTR)
			return errno == ECHILD ? -ESRCH : -errno;
		if (found == tid) {
			if (!WIFSTOPPED(status))
				return -ESRCH;
			classify(tid, status, state_ret);
			return 0;
		}
		now = uffd_now_ns();
		if (now >= until_ns)
			return is_trapped(tid, state_ret) ? 0 : -ETIMEDOUT;
		if (now - begin < SPIN_NS) {
			sched_yield();
		} else {
			if (is_trapped(tid, state_ret))
				return 0;
			nanosleep(&nap, NULL);
		}
	}
}

int uffd_trace_get_regs(pid_t tid, struct user_regs_struct *regs_ret)
{
	struct iovec vec = { regs_ret, sizeof(*regs_ret) };
	int ret = result(ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &vec));

	/* A thread of 32 bits has fewer registers. */
	return ret ? ret : vec.iov_len == sizeof(*regs_ret) ? 0 : -ENOEXEC;
}

int uffd_trace_set_regs(pid_t tid, const struct user_regs_struct *regs)
{
	struct iovec vec = { (void *)(uintptr_t)regs, sizeof(*regs) };

	return result(ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &vec));
}

int uffd_trace_get_fpregs(pid_t tid, struct user_fpregs_struct *regs_ret)
{
	struct iovec vec = { regs_ret, sizeof(*regs_ret) };
	int ret = result(ptrace(PTRACE_GETREGSET, tid, NT_PRFPREG, &vec));

	return ret ? ret : vec.iov_len == sizeof(*regs_ret) ? 0 : -ENOEXEC;
}

int uffd_trace_get_mask(pid_t tid, uint64_t *mask_ret)
{
	return result(ptrace(PTRACE_GETSIGMASK, tid, sizeof(*mask_ret), mask_ret));
}

int uffd_trace_set_mask(pid_t tid, uint64_t mask)
{
	return result(ptrace(PTRACE_SETSIGMASK, tid, sizeof(mask), &mask));
}

int uffd_trace_get_xstate(pid_t tid, void *buffer, uint64_t *length)
{
	struct iovec vec = { buffer, *length };
	int ret = result(ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, &vec));

	*length = ret ? 0 : vec.iov_len;
	return ret;
}

static bool signal_is_pending(pid_t tid)
{
	siginfo_t info;
	struct __ptrace_peeksiginfo_args args = { .nr = 1 };

	if (ptrace(PTRACE_PEEKSIGINFO, tid, &args, &info) > 0)
		return true;
	args.flags = PTRACE_PEEKSIGINFO_SHARED;
	return ptrace(PTRACE_PEEKSIGINFO, tid, &args, &info) > 0;
}

int uffd_trace_get_signals(pid_t tid, int32_t *stop_signal_ret, uint64_t *pending_ret)
{
	siginfo_t info[PEEKED];
	struct __ptrace_peeksiginfo_args args = { .nr = PEEKED };
	int n;

	*stop_signal_ret = 0;
	*pending_ret = 0;
	if (ptrace(PTRACE_GETSIGINFO, tid, 0, &info[0]))
		return -errno;
	/* A stop of ptrace's own tells the signal that has stopped the process, or SIGTRAP. */
	if (info[0].si_signo != SIGTRAP && info[0].si_code >> 8 == EVENT_STOP)
		*stop_signal_ret = info[0].si_signo;
	while ((n = (int)ptrace(PTRACE_PEEKSIGINFO, tid, &args, info)) > 0) {
		for (int i = 0; i < n; i++)
			if (info[i].si_signo >= 1 && info[i].si_signo <= 64)
				*pending_ret |= 1ull << (info[i].si_signo - 1);
		args.off += (uint64_t)n;
	}
	return n < 0 && errno == ESRCH ? -ESRCH : 0;
}

static bool waits_without_limit(const struct user_regs_struct *regs)
{
	switch (regs->orig_rax) {
	case SYS_epoll_wait:
	case SYS_epoll_pwait:
		return (int32_t)regs->r10 < 0;
#ifdef SYS_epoll_pwait2
	case SYS_epoll_pwait2:
#endif
	case SYS_semtimedop:
		return regs->r10 == 0;
	case SYS_rt_sigtimedwait:
		return regs->rdx == 0;
	case SYS_semop:
		return true;
	default:
		return false;
	}
}

void uffd_trace_restart(pid_t tid, struct user_regs_struct *regs)
{
	if ((int64_t)regs->rax != -EINTR || !waits_without_limit(regs) || signal_is_pending(tid))
		return;
	regs->rax = regs->orig_rax;
	regs->orig_rax = (uint64_t)-1;
	regs->rip -= 2; /* the length of the instruction syscall */
}
