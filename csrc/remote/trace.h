/* SPDX-License-Identifier: MIT */
/*
 * ptrace(2) of one thread, with a time limit for every wait.
 *
 * A tracer is a thread: the one that seizes a thread must make all further calls.  When it ends,
 * in any way, the kernel detaches the threads that it traces, and they continue.
 * Everything returns 0 or -errno; -ESRCH: the thread has ended.
 */
#ifndef UFFD_REMOTE_TRACE_H
#define UFFD_REMOTE_TRACE_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

/* Why a thread is stopped. */
enum uffd_trace_stop {
	UFFD_TRACE_SYSCALL,	/* at the entry or exit of a system call */
	UFFD_TRACE_TRAP,	/* interrupted, or its process is stopped by a signal */
	UFFD_TRACE_CLONE,	/* it has made a thread */
	UFFD_TRACE_SIGNAL,	/* a signal is about to be delivered */
	UFFD_TRACE_OTHER,
};

struct uffd_trace_state {
	enum uffd_trace_stop stop;
	int signal;
	/* Of UFFD_TRACE_CLONE: the new thread. */
	pid_t child;
};

/* Attach without stopping it; system call stops can be told from signals. */
int uffd_trace_seize(pid_t tid, unsigned long options);
int uffd_trace_interrupt(pid_t tid);
/* Wait until it is stopped; -ETIMEDOUT after `until_ns` on the monotonic clock. */
int uffd_trace_wait(pid_t tid, uint64_t until_ns, struct uffd_trace_state *state_ret);
/* Let it run to its next system call stop, or to an interruption. */
int uffd_trace_resume(pid_t tid, int signal);
int uffd_trace_detach(pid_t tid);
/* Let a process trace this one, where Yama (ptrace_scope 1) wants that said; 0: nobody in particular. */
int uffd_trace_allow(int32_t pid);

int uffd_trace_get_regs(pid_t tid, struct user_regs_struct *regs_ret);
int uffd_trace_set_regs(pid_t tid, const struct user_regs_struct *regs);
int uffd_trace_get_fpregs(pid_t tid, struct user_fpregs_struct *regs_ret);
int uffd_trace_get_mask(pid_t tid, uint64_t *mask_ret);
int uffd_trace_set_mask(pid_t tid, uint64_t mask);
/* The extended state in the format of XSAVE; length: in and out. */
int uffd_trace_get_xstate(pid_t tid, void *buffer, uint64_t *length);

/*
 * The signal that has stopped a stopped thread's process, or 0; and the signals that wait for the
 * thread alone, bit 0 is signal 1.
 */
int uffd_trace_get_signals(pid_t tid, int32_t *stop_signal_ret, uint64_t *pending_ret);

/*
 * After an interruption without a signal, some system calls return EINTR and others are restarted
 * (signal(7)).  Change the registers so that a call that waits without a time limit is restarted
 * too; if a signal is pending, EINTR is right.
 */
void uffd_trace_restart(pid_t tid, struct user_regs_struct *regs);

#endif /* UFFD_REMOTE_TRACE_H */
