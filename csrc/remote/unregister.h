/* SPDX-License-Identifier: MIT */
/*
 * Unregister private memory without a file, registered for write-protection, of a process that may
 * have mapped anything there meanwhile.
 *
 * UFFDIO_UNREGISTER of a range fails with EINVAL, and unregisters nothing, if any mapping in the
 * range cannot be registered (one of a file), or belongs to another userfaultfd; holes and memory
 * that is not registered do no harm (measured on Linux 6.18).
 *
 * Nothing here allocates or takes a lock.
 */
#ifndef UFFD_REMOTE_UNREGISTER_H
#define UFFD_REMOTE_UNREGISTER_H

#include <stdint.h>

/* Where the addresses of a process end. */
#define UFFD_ALL_MEMORY UINT64_MAX

/*
 * Unregister what is registered with this userfaultfd in [start, end), mapping by mapping, and wake
 * the threads that wait there.  `maps_fd`: an open /proc/PID/maps that nobody else reads at the same
 * time.  A mapping that moves meanwhile may be missed.  -errno if the mappings cannot be read.
 */
int uffd_unregister_mappings(int uffd, int maps_fd, uint64_t start, uint64_t end);

#endif /* UFFD_REMOTE_UNREGISTER_H */
