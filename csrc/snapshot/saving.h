/* SPDX-License-Identifier: MIT */
/* Take owed pages of a process, and put them on their way to the file. */
#ifndef UFFD_SNAPSHOT_SAVING_H
#define UFFD_SNAPSHOT_SAVING_H

#include <stdbool.h>
#include <stdint.h>

#include "snapshot/owed.h"
#include "snapshot/ring.h"

struct uffd_saving {
	int32_t pid;
	int32_t mem_fd;
	int32_t pagemap_fd;
	uint64_t memory_pages;	/* of the ring */
	uint64_t max_stall_ns;
	struct uffd_ring *ring;
	struct uffd_owed owed;
	uint64_t faults;	/* pages saved because of one */
	uint64_t swept;
	int error;		/* why nothing is saved any more */
};

/* Whether pages may be put in that nobody waits for. */
bool uffd_saving_has_room(struct uffd_saving *saving);
/* Save a page that a thread waits for, and its neighbours; returns what may be written now. */
uint64_t uffd_saving_around(struct uffd_saving *saving, uint64_t *address);
/* Everything in a range is about to be dropped, or was: save what is still there. */
void uffd_saving_before_drop(struct uffd_saving *saving, uint64_t start, uint64_t finish);
/* Save pages of one piece; false if some of them have changed, or cannot be read. */
bool uffd_saving_all(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address,
		     uint64_t pages);
/* Save each of them that can be saved; the others are lost. */
void uffd_saving_each(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address,
		      uint64_t pages);

#endif /* UFFD_SNAPSHOT_SAVING_H */
