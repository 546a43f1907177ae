/* SPDX-License-Identifier: MIT */
/*
 * Registering, protecting and unregistering the mappings that a tracker tracks: all of them in one
 * call each, adjacent ones by one ioctl.
 */
#ifndef UFFD_DIRTY_ARM_H
#define UFFD_DIRTY_ARM_H

#include <stdint.h>

#include "dirty/round.h"

/*
 * Mappings that one ioctl registers or unregisters: meanwhile the process cannot map memory or
 * unmap any.  Measured: 2 to 5 microseconds for each, and as much when the userfaultfd is closed
 * that they are registered with.
 */
#define UFFD_ARM_AT_ONCE 1000u

/* How many mappings, from one on, are adjacent and have one userfaultfd: one ioctl is for them. */
uint64_t uffd_arm_run(const struct uffd_tracked *at, uint64_t count);

/*
 * Register mappings for write protection, each with its own userfaultfd.  `error` of a mapping is
 * the errno of the kernel's refusal, or 0.
 */
void uffd_arm_register(struct uffd_tracked *tracked, uint64_t count);

/*
 * Protect the mappings whose `error` is 0, apart from sparse ones.  Returns 0, or -errno of the
 * first that could not be protected: the next round reports its pages as written.
 *
 * uffd: any userfaultfd of the process will do, whichever the mappings are registered with; the
 * kernel refuses one whose events are unread.
 */
int uffd_arm_protect(int uffd, const struct uffd_tracked *tracked, uint64_t count);

/*
 * Unregister mappings.  `error` of one is 0 also if it is gone in part, or is registered no longer;
 * EINVAL: it is gone, or another userfaultfd has a part of it now, and the kernel has unregistered
 * nothing of it.
 */
void uffd_arm_unregister(struct uffd_tracked *tracked, uint64_t count);

#endif /* UFFD_DIRTY_ARM_H */
