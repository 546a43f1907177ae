// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/syscall.h>

#include "remote/inject.h"
#include "remote/memory.h"

#define NO_SYSCALL ((uint64_t)-1)

/* Wait for a stop of one kind; others are passed on. A new thread is noted. */
int uffd_inject_wait(struct uffd_inject *in, pid_t tid, enum uffd_trace_stop wanted)
{
	struct uffd_trace_state state;
	int ret;

	for (;;) {
		ret = uffd_trace_wait(tid, in->until_ns, &state);
		if (ret || state.stop == wanted)
			return ret;
		if (state.stop == UFFD_TRACE_CLONE)
			in->child = state.child;
		ret = uffd_trace_resume(tid, state.stop == UFFD_TRACE_SIGNAL ? state.signal : 0);
		if (ret)
			return ret;
	}
}

/* Run to the next stop of a kind. */
static int run_to(struct uffd_inject *in, pid_t tid, enum uffd_trace_stop wanted)
{
	int ret = uffd_trace_resume(tid, 0);

	return ret ? ret : uffd_inject_wait(in, tid, wanted);
}

void uffd_inject_prepare(const struct uffd_inject *in, struct user_regs_struct *regs, uint64_t sp,
			 long number, const uint64_t arguments[5])
{
	*regs = in->regs;
	regs->rip = in->syscall_ret;
	regs->rsp = sp;
	regs->rax = (uint64_t)number;
	regs->orig_rax = NO_SYSCALL;
	regs->rdi = arguments[0];
	regs->rsi = arguments[1];
	regs->rdx = arguments[2];
	regs->r10 = arguments[3];
	regs->r8 = arguments[4];
	regs->r9 = 0;
}

/* From its entry to its exit; the result or -errno. */
int64_t uffd_inject_finish(struct uffd_inject *in, pid_t tid)
{
	struct user_regs_struct regs;
	int ret = run_to(in, tid, UFFD_TRACE_SYSCALL);

	if (!ret)
		ret = run_to(in, tid, UFFD_TRACE_SYSCALL);
	if (!ret)
		ret = uffd_trace_get_regs(tid, &regs);
	return ret ? ret : (int64_t)regs.rax;
}

int64_t uffd_inject_call(struct uffd_inject *in, pid_t tid, uint64_t sp, long number, uint64_t a,
		    uint64_t b, uint64_t c, uint64_t d, uint64_t e)
{
	const uint64_t arguments[5] = { a, b, c, d, e };
	struct user_regs_struct regs;
	int ret;

	uffd_inject_prepare(in, &regs, sp, number, arguments);
	ret = uffd_trace_set_regs(tid, &regs);
	return ret ? ret : uffd_inject_finish(in, tid);
}

int uffd_inject_put(pid_t tid, uint64_t at, const void *bytes, uint64_t length)
{
	int64_t n = uffd_remote_write(tid, at, bytes, length);

	return n < 0 ? (int)n : (uint64_t)n == length ? 0 : -EFAULT;
}

int uffd_inject_get(pid_t tid, uint64_t at, void *bytes, uint64_t length)
{
	struct uffd_page_region range = { .start = at, .end = at + length };
	struct uffd_page_ranges lost = { 0 };
	uint64_t copied = 0;
	int ret = uffd_remote_read(tid, &range, 1, bytes, length, UFFD_PACKED, &lost,
				   &copied);

	if (!ret && lost.count)
		ret = -EFAULT;
	free(lost.vec);
	return ret;
}

int uffd_inject_fetch(int pidfd, int64_t theirs, int32_t *fd_ret)
{
	long fd = syscall(SYS_pidfd_getfd, pidfd, (int)theirs, 0);

	*fd_ret = fd < 0 ? -1 : (int32_t)fd;
	return fd < 0 ? -errno : 0;
}
