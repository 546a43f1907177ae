/* SPDX-License-Identifier: MIT */
/*
 * Open a userfaultfd for the memory of another process, by system calls made in it.
 *
 * One thread of the target is stopped meanwhile.  It maps a page and makes a helper thread, which
 * begins with an empty table of descriptors, so that a descriptor which it opens is never in the
 * target's table and is closed when the helper ends.  The helper opens the userfaultfd;
 * pidfd_getfd(2) fetches it; the helper ends, the page is unmapped, and the thread continues where
 * it was.
 *
 * A child process that shares this process's memory and descriptors does all this: a SIGKILL of
 * this process does not end it.  If the child is killed, both threads continue by themselves (see
 * frame.h), and only one page remains in the target.
 */
#ifndef UFFD_REMOTE_ATTACH_H
#define UFFD_REMOTE_ATTACH_H

#include <stdint.h>

/* How far it is; also the points where a test can stop it. */
enum uffd_attach_point {
	UFFD_ATTACH_BEGIN,
	UFFD_ATTACH_SEIZED,
	UFFD_ATTACH_STOPPED,
	UFFD_ATTACH_FRAMED,	/* the way home is written */
	UFFD_ATTACH_REDIRECTED,	/* the registers are those of the first system call */
	UFFD_ATTACH_MASKED,	/* all signals are blocked */
	UFFD_ATTACH_MAPPED,	/* the page is mapped */
	UFFD_ATTACH_PREPARED,	/* the helper's way out is written */
	UFFD_ATTACH_CLONED,	/* the helper exists */
	UFFD_ATTACH_OPENED,	/* the helper has a userfaultfd */
	UFFD_ATTACH_FETCHED,	/* and so has this process */
	UFFD_ATTACH_ENDED,	/* the helper has ended */
	UFFD_ATTACH_UNMAPPED,	/* the page is unmapped */
	UFFD_ATTACH_HALTED,	/* the thread is stopped before its own code */
	UFFD_ATTACH_UNMASKED,	/* its signal mask is its own again */
	UFFD_ATTACH_RESTORED,	/* its registers are its own again */
	UFFD_ATTACH_DONE,
};

struct uffd_attach {
	/* The thread, and two instruction sequences in its memory: "syscall; ret" and
	 * "mov $15, %eax; syscall". */
	int32_t tid;
	uint64_t syscall_ret;
	uint64_t restorer;
	/* Unused memory for the way home, UFFD_FRAME_MOST bytes; 0: below the thread's stack
	 * pointer, if that is in [stack_start, stack_end). */
	uint64_t scratch;
	uint64_t stack_start;
	uint64_t stack_end;
	/* Where the page goes, if that is free. */
	uint64_t place;
	/* Flags of userfaultfd(2). */
	int32_t flags;
	/* An open /dev/userfaultfd, for targets without the privilege; -1: none. */
	int32_t device;
	uint32_t suspend_seccomp;
	uint64_t limit_ns;
	/* For tests: wait at this point while this process lives; 0: nowhere. */
	uint32_t hold;

	/* Results: how far it is, or was when it failed; how long the thread was stopped. */
	uint32_t point;
	uint32_t held;
	int32_t error;
	uint64_t stopped_ns;
	int32_t by_device;
};

/* fd_ret: the userfaultfd, before its handshake. 0 or -errno; `point` tells of what. */
int uffd_attach(struct uffd_attach *attach, int32_t *fd_ret);

#endif /* UFFD_REMOTE_ATTACH_H */
