// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <stdlib.h>

#include "base/array.h"
#include "base/clock.h"
#include "base/page.h"
#include "base/poll.h"
#include "snapshot/unread.h"
#include "uffd_shim.h"

#define FIRST_CAPACITY 1024u

_Static_assert(UFFD_UNREAD_OTHERS <= FIRST_CAPACITY, "of one read");

static bool has_room(struct uffd_unread *unread)
{
	return !uffd_array_grow((void **)&unread->faults, &unread->faults_capacity,
				unread->faults_count + UFFD_UNREAD_OTHERS, FIRST_CAPACITY,
				sizeof(*unread->faults));
}

static void add(struct uffd_unread *unread, const struct uffd_msg *message)
{
	if (message->event == UFFD_EVENT_PAGEFAULT)
		unread->faults[unread->faults_count++] =
			message->arg.pagefault.address / BASE_PAGE * BASE_PAGE;
	else
		unread->others[unread->others_count++] = *message;
}

static int by_address(const void *a, const void *b)
{
	const uint64_t *one = a, *other = b;

	return *one < *other ? -1 : *one > *other;
}

uint64_t uffd_unread_take(struct uffd_unread *unread, int uffd)
{
	struct uffd_msg read[UFFD_UNREAD_OTHERS];
	uint64_t began = 0;
	bool all = false;

	unread->faults_count = unread->others_count = 0;
	while (!all && has_room(unread)) {
		uint64_t count;
		int64_t n;

		began = uffd_now_ns();
		n = uffd_shim_read(uffd, read, sizeof(read));
		count = n > 0 ? (uint64_t)n / sizeof(*read) : 0;
		for (uint64_t i = 0; i < count; i++)
			add(unread, &read[i]);
		/* The kernel has other messages only when no fault is left. */
		all = count < UFFD_UNREAD_OTHERS || unread->others_count;
	}
	if (unread->faults_count)
		qsort(unread->faults, unread->faults_count, sizeof(*unread->faults), by_address);
	return all ? began : 0;
}

bool uffd_unread_any(int uffd)
{
	struct pollfd ready = { .fd = uffd, .events = POLLIN };

	return uffd_poll(&ready, 1, 0) != 0;
}

void uffd_unread_deinit(struct uffd_unread *unread)
{
	free(unread->faults);
	*unread = (struct uffd_unread){ 0 };
}
