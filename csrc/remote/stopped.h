/* SPDX-License-Identifier: MIT */
/*
 * Hold all threads of some processes, by a thread of this process that traces them.
 *
 * When it ends, by a release or with this process, the kernel lets them go on: no register of
 * theirs is changed while they stand.
 */
#ifndef UFFD_REMOTE_STOPPED_H
#define UFFD_REMOTE_STOPPED_H

#include <stdint.h>

struct uffd_stopped;

/*
 * Stop every thread of the processes, and those that come meanwhile, until the lists are stable.
 * -ETIMEDOUT: `tid_ret` did not stop in time, and everything runs again. Other errors likewise.
 * A thread that waits in vfork(2) for a process of the list counts as stopped. ns_ret: how long it
 * took. threads_ret: how many stand.
 */
int uffd_stopped_create(const int32_t *pids, uint32_t count, uint64_t limit_ns,
			struct uffd_stopped **stopped_ret, int32_t *tid_ret, uint32_t *threads_ret,
			uint64_t *ns_ret);

/* Let them go on, and free it; NULL is fine. */
void uffd_stopped_release(struct uffd_stopped *stopped);

#endif /* UFFD_REMOTE_STOPPED_H */
