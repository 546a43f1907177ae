/* SPDX-License-Identifier: MIT */
/*
 * Look at the process that a userfaultfd governs, from another process: its mappings, its
 * memory, and the process that a thread belongs to.
 *
 * Nothing here allocates or takes a lock.  A process is named by its pid; callers make
 * sure that it is still the same process.
 */
#ifndef UFFD_OWNER_H
#define UFFD_OWNER_H

#include <stdint.h>

/* Facts about a process's mappings in a range: */
#define UFFD_MAPS_ANONYMOUS	(1u << 0)	/* some of it has no file behind it */
#define UFFD_MAPS_SHARED	(1u << 1)	/* some of it is shared */
/* The kernel reports these only together with slow statistics: */
#define UFFD_MAPS_REGISTERED	(1u << 2)	/* all of it is registered with some userfaultfd */
#define UFFD_MAPS_NOT_FORKED	(1u << 3)	/* forks get none of it, or get it wiped */

/*
 * Read /proc/PID/maps, or smaps for all four facts.  -EFAULT: not all of the range is
 * mapped; -ESRCH: there is no such process; -EACCES: no permission to look at it.
 */
int uffd_owner_look(int32_t pid, uint64_t start, uint64_t length, uint32_t all_facts,
		    uint32_t *facts_ret);

/*
 * process_vm_readv(2).  Returns the bytes read before an error stopped it, 0 only for
 * length 0, or -errno.
 */
int64_t uffd_owner_read(int32_t pid, uint64_t start, void *target, uint64_t length);

/* Read one byte of every page, so that missing pages are mapped. */
int uffd_owner_touch(int32_t pid, uint64_t start, uint64_t length, uint64_t step);

/*
 * Find the process that a thread belongs to, if it has registered memory at the address:
 * its pid, and a pidfd for the caller to close.  `thread_id`: in this process's PID
 * namespace.  -EFAULT: it has no such memory, so it is another thread.
 */
int uffd_owner_of_thread(uint32_t thread_id, uint64_t address, int32_t *pid_ret, int *pidfd_ret);

#endif /* UFFD_OWNER_H */
