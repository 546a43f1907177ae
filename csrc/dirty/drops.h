/* SPDX-License-Identifier: MIT */
/*
 * A process that reads the REMOVE events of a userfaultfd with WP_ASYNC, and notes their
 * ranges.  A thread that drops memory waits until its event is read, even while this
 * process is stopped by a signal.  So the reader is a separate process; it shares this
 * one's memory, and ends with it.
 */
#ifndef UFFD_DIRTY_DROPS_H
#define UFFD_DIRTY_DROPS_H

#include <stdint.h>

#include "uffd_pagemap.h"

struct uffd_drops;

/* Start it.  The userfaultfd is O_NONBLOCK, and nobody else reads it. */
int uffd_drops_create(int uffd, struct uffd_drops **drops_ret);

/*
 * Take what was noted since the last call: sorted ranges, to be freed with uffd_pagemap_release().
 * That is every event that was read by now; the memory of one is dropped some time after it was
 * read.
 *
 * lost_ret: set if events may be missing: there were too many, the reader was killed (another one
 * has been started then), or it was stopped for longer than a second between reading and noting.
 * After an error the next call has all of it.
 */
int uffd_drops_take(struct uffd_drops *drops, struct uffd_page_ranges *ranges_ret,
		    uint32_t *lost_ret);

/* End it, free it, and empty its place, which may be empty.  In a fork of this process: free it. */
void uffd_drops_destroy(struct uffd_drops **drops);

#endif /* UFFD_DIRTY_DROPS_H */
