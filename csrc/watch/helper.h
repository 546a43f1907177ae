/* SPDX-License-Identifier: MIT */
/*
 * Say that a helper process has ended.  A thread that faults may hold the GIL, so nothing
 * in Python could say it.
 */
#ifndef UFFD_HELPER_H
#define UFFD_HELPER_H

#include <stdbool.h>
#include <stdint.h>

/* Never block on stderr: forks and close() wait for the thread that watches. */
bool uffd_helper_can_say(int fd);
/* Write a line if the process has ended; returns whether it was written. */
bool uffd_helper_say_end(int pidfd, int32_t pid, int say_fd);

#endif /* UFFD_HELPER_H */
