/* SPDX-License-Identifier: MIT */
/*
 * Hold all threads of some processes, by a helper of this process that traces them.
 *
 * When it ends, by a release or with this process, the kernel lets them continue: their registers
 * are not changed while they are stopped.  The helper is a process in the same memory.  When this
 * process is stopped itself, by a signal or a debugger, for 50 ms or more, it lets them go.
 */
#ifndef UFFD_REMOTE_STOPPED_H
#define UFFD_REMOTE_STOPPED_H

#include <stdint.h>

#include "remote/registers.h"

struct uffd_stopped;

/*
 * Stop every thread of the processes, and new ones, until the lists are stable.  After an error all
 * threads run again; -ETIMEDOUT: `tid_ret` did not stop in time, or within `asleep_limit_ns` if it
 * waits in the kernel (state D) while others are stopped.  A thread that waits in vfork(2) for a
 * process of the list counts as stopped.  ns_ret: the time needed.  threads_ret: how many are
 * stopped.
 */
int uffd_stopped_create(const int32_t *pids, uint32_t count, uint64_t limit_ns,
			uint64_t asleep_limit_ns, struct uffd_stopped **stopped_ret, int32_t *tid_ret,
			uint32_t *threads_ret, uint64_t *ns_ret);

/*
 * The registers of all of them, in the order of the lists.  A thread that has ended meanwhile
 * (SIGKILL) is left out; one that waits in vfork(2) has UFFD_REGISTERS_PARTIAL.
 */
int uffd_stopped_registers(struct uffd_stopped *stopped, struct uffd_register_sets *sets_ret);

/* Let them continue; -ETIMEDOUT: they did already, as this process was stopped meanwhile. */
int uffd_stopped_end(struct uffd_stopped *stopped);

/* The same, free it, and empty its place, which may be empty. */
void uffd_stopped_release(struct uffd_stopped **stopped);

#endif /* UFFD_REMOTE_STOPPED_H */
