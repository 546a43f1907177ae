/* SPDX-License-Identifier: MIT */
/* Whole transfers between a descriptor and memory. */
#ifndef UFFD_TRANSFER_H
#define UFFD_TRANSFER_H

#include <stdint.h>

#define UFFD_POLL_MOST 8

/*
 * Read exactly `length` bytes: by pread(2) from `at`, or by read(2) if that is negative.
 * `done` counts them, also before an error; another call continues after them.  -EINTR: a signal
 * arrived; -ENODATA: the end was reached first.  Waits even if the descriptor does not block.
 */
int uffd_transfer_read(int fd, int64_t at, void *target, uint64_t length, uint64_t *done);

/* Write exactly `length` bytes, likewise. */
int uffd_transfer_write(int fd, int64_t at, const void *source, uint64_t length, uint64_t *done);

/*
 * Wait for at most UFFD_POLL_MOST descriptors, whatever RLIMIT_NOFILE is.  `events` tells what for, as
 * in poll(2), and then what is ready.  Return how many are, or -errno; -EINTR: a signal arrived.
 */
int uffd_transfer_poll(const int32_t *fds, int16_t *events, uint32_t count, int32_t timeout_ms);

#endif /* UFFD_TRANSFER_H */
