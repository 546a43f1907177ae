/* SPDX-License-Identifier: MIT */
/* The line about a thread that waits although nobody reads. */
#ifndef UFFD_WORDS_H
#define UFFD_WORDS_H

#include "base/line.h"
#include "waiters.h"
#include "watched.h"

/*
 * Name the thread, what it waits for and since when, and what to do.  `others`: how many
 * more threads wait.
 */
void uffd_words_put(struct uffd_line *line, const struct uffd_watched *watched,
		    const struct uffd_waiter *waiter, enum uffd_search search,
		    uint64_t seconds, uint32_t others);

#endif /* UFFD_WORDS_H */
