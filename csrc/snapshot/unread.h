/* SPDX-License-Identifier: MIT */
/*
 * The unread faults of a userfaultfd, all at once.
 *
 * The kernel looks at every waiting thread for each call that wakes some.  Who knows all faults can
 * answer them in the order of their addresses, and wake many threads by one call.
 */
#ifndef UFFD_SNAPSHOT_UNREAD_H
#define UFFD_SNAPSHOT_UNREAD_H

#include <stdbool.h>
#include <stdint.h>

#include "uffd_abi.h"

/* Messages of one read(2). */
#define UFFD_UNREAD_OTHERS 64u

struct uffd_unread {
	/* Addresses of pages, in ascending order. */
	uint64_t *faults;
	uint64_t faults_count, faults_capacity;
	/* Other messages, in the order of the kernel; who sent one waits no more. */
	struct uffd_msg others[UFFD_UNREAD_OTHERS];
	uint64_t others_count;
};

/*
 * Read all faults, and some other messages if there are any.  Returns a time: a fault that is
 * unread afterwards was sent later; 0 if memory was short, and faults may be left.
 */
uint64_t uffd_unread_take(struct uffd_unread *unread, int uffd);
/* Whether a message is unread. */
bool uffd_unread_any(int uffd);
void uffd_unread_deinit(struct uffd_unread *unread);

#endif /* UFFD_SNAPSHOT_UNREAD_H */
