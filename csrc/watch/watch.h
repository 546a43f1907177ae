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

#include <stdint.h>

/* The expected reader. */
enum uffd_watch_reader {
	UFFD_WATCH_USER,	/* the program itself */
	UFFD_WATCH_HANDLER,	/* a handler, which has not been started */
};

struct uffd_watched {
	int32_t fd;
	int32_t owner_pid;	/* the process it governs; 0: this process */
	int32_t sent_to;	/* the process it was sent to; 0: none known, -1: an unknown one */
	int32_t say_fd;		/* where to write; -1: nowhere, so it is not watched */
	uint64_t low, high;	/* bounds of the registered memory, as far as known */
	uint32_t reader;	/* enum uffd_watch_reader */
	uint32_t has_forks;	/* forks wait for their event to be read */
};

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
