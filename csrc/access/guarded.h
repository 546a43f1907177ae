/* SPDX-License-Identifier: MIT */
/*
 * Accesses that may end in SIGBUS or SIGSEGV and are told about it instead, and
 * a forked child that makes such accesses on request.  For tests of the kernel;
 * nothing that serves faults uses it.
 */
#ifndef UFFD_GUARDED_H
#define UFFD_GUARDED_H

#include <stdint.h>

/* What the signal's siginfo said; `number` is 0 when the access completed. */
struct uffd_signal {
	int32_t number;
	int32_t code;
	uint64_t address;
};

/* What the child is asked; WRITE's bytes follow it, READ's bytes follow the reply. */
enum uffd_agent_op {
	UFFD_AGENT_READ,
	UFFD_AGENT_WRITE,
	UFFD_AGENT_SYSCALL,
};

struct uffd_agent_request {
	uint64_t op;
	/* address and length, or the number and the arguments of a system call. */
	uint64_t args[7];
};

struct uffd_agent_reply {
	struct uffd_signal signal;
	/* Of a system call: its result, or -errno. */
	int64_t result;
};

/* The bytes one READ or WRITE of the child may carry. */
#define UFFD_AGENT_BYTES	65536

/*
 * Copy between `buffer` and memory; return 0, or the number of the signal that
 * stopped it, with its details in `ret`.  What was copied before stays copied.
 */
int uffd_guarded_read(uint64_t address, void *buffer, uint64_t length, struct uffd_signal *ret);
int uffd_guarded_write(uint64_t address, const void *buffer, uint64_t length,
		       struct uffd_signal *ret);

/*
 * fork(2), which waits for the FORK event to be read where one is sent; the child
 * serves requests from the socket `fd` until its end is closed, and dies with the
 * thread that forked it.  Returns its pid, or -errno.
 */
int uffd_agent_fork(int fd);

#endif
