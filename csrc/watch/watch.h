/* SPDX-License-Identifier: MIT */
/*
 * A line on stderr where a thread has waited for two seconds and nobody reads the
 * userfaultfd: no handler runs there, and nothing else says why the program hangs.
 *
 * One thread of the process looks, as long as there is something to look at.  It
 * holds no descriptors and reads no messages.
 */
#ifndef UFFD_WATCH_H
#define UFFD_WATCH_H

#include <stdint.h>

/* Who is to read it. */
enum uffd_watch_reader {
	UFFD_WATCH_USER,	/* the program, by itself */
	UFFD_WATCH_HANDLER,	/* a handler, which has not been started */
};

struct uffd_watched {
	int32_t fd;
	int32_t owner_pid;	/* whose memory it governs; 0: this process's */
	int32_t sent_to;	/* a process that was given it, too; 0: none is known, -1: some process */
	int32_t say_fd;		/* where to write; -1: nowhere, so it is not watched */
	uint64_t low, high;	/* what is registered lies there, as far as is known */
	uint32_t reader;	/* enum uffd_watch_reader */
	uint32_t has_forks;	/* forks wait for their event to be read */
};

/* Begin, or change what is known.  Where no thread can be made, nobody looks. */
void uffd_watch_begin(const struct uffd_watched *watched);
/* Before it is closed, and when somebody answers.  Fine for what is not watched. */
void uffd_watch_end(int fd);
/* Somebody has read messages. */
void uffd_watch_note_read(int fd);
/* read(2), and note it. */
int64_t uffd_watch_read(int fd, void *buffer, uint64_t size);
/*
 * End the thread for a while and begin again: Python warns of forks of processes that
 * have threads.  It goes on where forks wait for their event.
 */
void uffd_watch_pause(void);
void uffd_watch_resume(void);

#endif /* UFFD_WATCH_H */
