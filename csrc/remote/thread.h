/* SPDX-License-Identifier: MIT */
/* What /proc tells about a thread. */
#ifndef UFFD_REMOTE_THREAD_H
#define UFFD_REMOTE_THREAD_H

#include <stdbool.h>
#include <sys/types.h>

/* The letter of /proc/PID/stat: 'X' if it has ended, '?' if that cannot be read. */
char uffd_thread_state(pid_t tid);

/* Whether it waits in vfork(2), clone(2) or clone3(2) until its child has other memory. */
bool uffd_thread_waits_for_child(pid_t tid);

#endif /* UFFD_REMOTE_THREAD_H */
