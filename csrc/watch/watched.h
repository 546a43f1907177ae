/* SPDX-License-Identifier: MIT */
/* A userfaultfd that is watched, and what is known of it. */
#ifndef UFFD_WATCHED_H
#define UFFD_WATCHED_H

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

#endif /* UFFD_WATCHED_H */
