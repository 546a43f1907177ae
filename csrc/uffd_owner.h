/* SPDX-License-Identifier: MIT */
/*
 * A process whose memory a userfaultfd governs, seen from another one: what it has
 * mapped, what its memory holds, and which process a thread belongs to.
 *
 * Nothing here allocates or takes a lock.  A process is named by its id; callers
 * make sure that it is still the one they mean.
 */
#ifndef UFFD_OWNER_H
#define UFFD_OWNER_H

#include <stdint.h>

/* What a process has mapped in a range: */
#define UFFD_MAPS_ANONYMOUS	(1u << 0)	/* some of it has no file behind it */
#define UFFD_MAPS_SHARED	(1u << 1)	/* some of it is shared */
/* Of these the kernel tells only together with slow statistics: */
#define UFFD_MAPS_REGISTERED	(1u << 2)	/* all of it, with some userfaultfd */
#define UFFD_MAPS_NOT_FORKED	(1u << 3)	/* forks get none of it, or get it wiped */

/*
 * Look at /proc/PID/maps, or for all four at smaps.
 * -EFAULT: not all of it is mapped; -ESRCH: there is no such process; -EACCES: it
 * may not be looked at.
 */
int uffd_owner_look(int32_t pid, uint64_t start, uint64_t length, uint32_t all_facts,
		    uint32_t *facts_ret);

/*
 * process_vm_readv(2).  Bytes read before something stopped it, 0 only for length 0,
 * or -errno.
 */
int64_t uffd_owner_read(int32_t pid, uint64_t start, void *target, uint64_t length);

/* Read one byte of every page, so that what was missing is mapped. */
int uffd_owner_touch(int32_t pid, uint64_t start, uint64_t length, uint64_t step);

/*
 * The process that a thread belongs to, if it has registered memory at the address:
 * its id, and a pidfd for the caller to close.  `thread_id` counts in this process's
 * PID namespace.  -EFAULT: it has no such memory, so it is not the thread meant.
 */
int uffd_owner_of_thread(uint32_t thread_id, uint64_t address, int32_t *pid_ret, int *pidfd_ret);

#endif /* UFFD_OWNER_H */
