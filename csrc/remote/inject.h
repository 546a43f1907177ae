/* SPDX-License-Identifier: MIT */
/*
 * System calls made in a stopped thread, through its registers.
 */
#ifndef UFFD_REMOTE_INJECT_H
#define UFFD_REMOTE_INJECT_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#include "remote/trace.h"

struct uffd_inject {
	/* "syscall; ret" in the target. */
	uint64_t syscall_ret;
	/* When to give up, on the monotonic clock. */
	uint64_t until_ns;
	/* Registers of the stopped thread: a system call keeps those that it does not need. */
	struct user_regs_struct regs;
	/* The thread that was made last. */
	pid_t child;
};

/* Wait for a stop of one kind; other stops are passed over. */
int uffd_inject_wait(struct uffd_inject *in, pid_t tid, enum uffd_trace_stop wanted);

/* The registers of a system call; `sp`: what the `ret` behind it pops. */
void uffd_inject_prepare(const struct uffd_inject *in, struct user_regs_struct *regs, uint64_t sp,
			 long number, const uint64_t arguments[5]);
/* From before its entry to its exit; the result or -errno. */
int64_t uffd_inject_finish(struct uffd_inject *in, pid_t tid);
/* All of it. */
int64_t uffd_inject_call(struct uffd_inject *in, pid_t tid, uint64_t sp, long number, uint64_t a,
			 uint64_t b, uint64_t c, uint64_t d, uint64_t e);

/* Memory of the target, all of it or -EFAULT. */
int uffd_inject_put(pid_t tid, uint64_t at, const void *bytes, uint64_t length);
int uffd_inject_get(pid_t tid, uint64_t at, void *bytes, uint64_t length);

/* Duplicate a descriptor of a thread, which its pidfd names, to this process. */
int uffd_inject_fetch(int pidfd, int64_t theirs, int32_t *fd_ret);

#endif /* UFFD_REMOTE_INJECT_H */
