/* SPDX-License-Identifier: MIT */
/*
 * Accesses that report a SIGBUS or SIGSEGV instead of dying from it, and a forked child
 * that makes such accesses on request.  For tests of the kernel; not used to serve
 * faults.
 */
#ifndef UFFD_GUARDED_H
#define UFFD_GUARDED_H

#include <stdint.h>

/* From the signal's siginfo; `number` is 0 if the access completed. */
struct uffd_signal {
	int32_t number;
	int32_t code;
	uint64_t address;
};

/* Requests to the child; WRITE's bytes follow the request, READ's follow the reply. */
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
	/* The result of a system call, or -errno. */
	int64_t result;
};

/* The most bytes that one READ or WRITE may carry. */
#define UFFD_AGENT_BYTES	65536

/*
 * Copy between `buffer` and memory.  Return 0, or the number of the signal that stopped
 * the copy, with its details in `ret`; bytes copied before that stay copied.
 */
int uffd_guarded_read(uint64_t address, void *buffer, uint64_t length, struct uffd_signal *ret);
int uffd_guarded_write(uint64_t address, const void *buffer, uint64_t length,
		       struct uffd_signal *ret);

/*
 * fork(2), which waits until the FORK event is read if one is sent.  The child serves
 * requests from the socket `fd` until the other end is closed, and is killed when the
 * thread that forked it ends.  Returns its pid, or -errno.
 */
int uffd_agent_fork(int fd);

#endif
