/* SPDX-License-Identifier: MIT */
/* Take owed pages of a process, and put them on their way to the file. */
#ifndef UFFD_SNAPSHOT_SAVING_H
#define UFFD_SNAPSHOT_SAVING_H

#include <stdbool.h>
#include <stdint.h>

#include "remote/cold.h"
#include "snapshot/owed.h"
#include "snapshot/ring.h"

struct uffd_saving {
	int32_t pid;
	int32_t uffd;
	int32_t mem_fd;
	int32_t pagemap_fd;
	uint64_t memory_pages;	/* of the ring */
	uint64_t max_stall_ns;
	/*
	 * When the first of the faults that are being answered may have been sent, 0: there
	 * are none; and a time before those that are unread.
	 */
	uint64_t since_ns, unread_ns;
	struct uffd_ring *ring;
	struct uffd_owed owed;
	uint64_t faults;	/* pages saved because of one */
	uint64_t swept;
	/* Counts changes of the layout. */
	uint64_t changes;
	int error;		/* why nothing is saved any more */
	struct uffd_cold cold;
};

/*
 * Whether the layout changes now: then the reason is in a message that is still unread, and what
 * was read before may be of other memory than the address referred to.
 */
bool uffd_saving_is_changing(const struct uffd_saving *saving);
/* Look whether messages are unread: with none, who sends one waits from now on. */
bool uffd_saving_has_unread(struct uffd_saving *saving);
/*
 * Save a page that a thread waits for, and its neighbours; returns what may be written now.  0: the
 * layout changes, so the thread has to try it again.
 */
uint64_t uffd_saving_around(struct uffd_saving *saving, uint64_t *address);
/* Everything in a range is about to be dropped: save it. */
void uffd_saving_before_drop(struct uffd_saving *saving, uint64_t start, uint64_t finish);
/* Everything in a range was unmapped, and other memory may be there by now. */
void uffd_saving_lose(struct uffd_saving *saving, uint64_t start, uint64_t finish);
/* Save a page if that is possible; it is lost otherwise, unless the layout changes. */
void uffd_saving_one(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address);

#endif /* UFFD_SNAPSHOT_SAVING_H */
