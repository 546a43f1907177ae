/* SPDX-License-Identifier: MIT */
/* Open a userfaultfd in a process that may not, by an open /dev/userfaultfd of this process. */
#ifndef UFFD_REMOTE_DEVICE_H
#define UFFD_REMOTE_DEVICE_H

#include <stdint.h>

#include "remote/inject.h"

/*
 * The helper, `calls->child`, gets the device over a pair of sockets that it makes, and asks it for
 * a userfaultfd.  sp: its stack pointer.  at: where it has memory for the arguments.  pidfd: of the
 * helper.  Returns the helper's descriptor, or -errno.
 */
int64_t uffd_device_open(struct uffd_inject *calls, uint64_t sp, uint64_t at, int pidfd, int device,
			 uint64_t flags);

#endif /* UFFD_REMOTE_DEVICE_H */
