/* SPDX-License-Identifier: MIT */
/* The line about a thread that waits although nobody reads. */
#ifndef UFFD_WORDS_H
#define UFFD_WORDS_H

#include "base/line.h"
#include "waiters.h"
#include "watched.h"

/* A thread of this process that has waited for the GIL as long. */
enum uffd_words_gil {
	UFFD_WORDS_NO_GIL,	/* there is none */
	UFFD_WORDS_SOMEBODY,
	UFFD_WORDS_READER,	/* it was the last to read the userfaultfd */
};

struct uffd_words_wait {
	uint64_t seconds;
	uint32_t others;	/* how many more threads wait */
	enum uffd_words_gil gil;
	int32_t gil_thread_id;
};

/* Name the thread, what it waits for and since when, and what to do. */
void uffd_words_put(struct uffd_line *line, const struct uffd_watched *watched,
		    const struct uffd_waiter *waiter, enum uffd_search search,
		    const struct uffd_words_wait *wait);

#endif /* UFFD_WORDS_H */
