/* SPDX-License-Identifier: MIT */
/*
 * What may write to a process's memory past its page table: descriptors that pin memory,
 * and direct reads (O_DIRECT) that are under way, which pin their buffers.
 */
#ifndef UFFD_REMOTE_PINS_H
#define UFFD_REMOTE_PINS_H

#include <stdint.h>

#include "uffd_pagemap.h"

struct uffd_pinners {
	int32_t *fds;		/* of io_uring, and of devices for direct access */
	uint64_t capacity;	/* what fits there */
	uint64_t count;		/* how many there are */
	int32_t direct_fd;	/* one that is open with O_DIRECT, or -1 */
};

/* Look at the descriptors of a process; 0 or -errno of opening /proc/PID/fd. */
int uffd_remote_pinners(int32_t pid, struct uffd_pinners *pinners);

struct uffd_reads {
	struct uffd_page_ranges pages;	/* of the buffers of threads that sleep in read(2) and the like */
	uint32_t running;		/* threads that run, or were not seen: what they do is unknown */
};

/*
 * Look at the threads of a process.  A read from a pipe, a socket or a terminal does not count: it
 * copies through the page table.  0 or -errno of opening /proc/PID/task.
 */
int uffd_remote_reads(int32_t pid, struct uffd_reads *reads_ret);
void uffd_remote_free_reads(struct uffd_reads *reads);

#endif /* UFFD_REMOTE_PINS_H */
