/* SPDX-License-Identifier: MIT */
/* poll(2) that RLIMIT_NOFILE does not disturb.  Async-signal-safe. */
#ifndef UFFD_BASE_POLL_H
#define UFFD_BASE_POLL_H

#include <poll.h>

/*
 * As poll(2).  That refuses more descriptors than RLIMIT_NOFILE, which a program may lower, to 0 even, while its
 * descriptors stay open; this one waits for them all the same.  Only POLLIN and POLLOUT are told then.
 */
int uffd_poll(struct pollfd *fds, unsigned int count, int timeout_ms);

#endif /* UFFD_BASE_POLL_H */
