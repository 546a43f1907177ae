/* SPDX-License-Identifier: MIT */
/*
 * Write a line on stderr if a thread has waited for two seconds and its userfaultfd is not
 * read: no handler runs there, and nothing else says why the program hangs.
 *
 * One thread of the process watches, as long as there is a userfaultfd to watch.  It has
 * no descriptors of its own and reads no messages.
 */
#ifndef UFFD_WATCH_H
#define UFFD_WATCH_H

#include "watched.h"

/* Begin to watch, or update an entry.  If no thread can be created, nothing is watched. */
void uffd_watch_begin(const struct uffd_watched *watched);
/* Call before it is closed, and when a reader begins; harmless if it is not watched. */
void uffd_watch_end(int fd);
/*
 * End the thread for a while, and start it again: Python warns about forks of processes
 * that have threads.  The thread stays if forks wait for their event to be read.
 */
void uffd_watch_pause(void);
void uffd_watch_resume(void);

#endif /* UFFD_WATCH_H */
