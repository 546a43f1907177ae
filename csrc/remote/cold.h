/* SPDX-License-Identifier: MIT */
/*
 * Memory of another process that is on swap, read so that it is no harder to swap out than before.
 *
 * Reading gives the process pages, which count against the limit of its memory cgroup and look as if
 * they were in use.  At the limit, the kernel then finds nothing that it can take away, and kills the
 * process.  So pages that were on swap are marked as unused when they have been read.
 */
#ifndef UFFD_REMOTE_COLD_H
#define UFFD_REMOTE_COLD_H

#include <stdint.h>
#include <sys/uio.h>

#define UFFD_COLD_MOST 512u

struct uffd_cold {
	int pidfd; /* -1: nothing is done */
	int pagemap_fd;
	uint64_t count;
	struct iovec vec[UFFD_COLD_MOST];
};

/* Begin, if the process has something on swap; cold->pidfd tells.  It needs CAP_SYS_NICE. */
void uffd_cold_open(struct uffd_cold *cold, int32_t pid);
/* A range is about to be read: note what of it is on swap. */
void uffd_cold_note(struct uffd_cold *cold, uint64_t start, uint64_t end);
/* What was noted has been read. */
void uffd_cold_again(struct uffd_cold *cold);
void uffd_cold_close(struct uffd_cold *cold);

#endif /* UFFD_REMOTE_COLD_H */
