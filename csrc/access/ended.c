// SPDX-License-Identifier: MIT
/*
 * The ranges are noted one after the other, while the interpreter exits, and never
 * forgotten.  The signal handler reads the list without a lock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ended.h"
#include "sigbus.h"
#include "base/line.h"
#include "base/page.h"

struct ended {
	struct ended *next;
	uint64_t start, end;
	int fd;
};

static _Atomic(struct ended *) newest;

static void explain(uint64_t address)
{
	static _Atomic bool said;
	struct uffd_line line = { .used = 0 };
	uint64_t page = address & ~(uint64_t)(BASE_PAGE - 1);
	const struct ended *one = atomic_load(&newest);

	while (one && !(one->start <= address && address < one->end))
		one = one->next;
	if (!one || atomic_exchange(&said, true))
		return;
	uffd_line_text(&line, "pyuffd: SIGBUS: thread ");
	uffd_line_number(&line, (uint64_t)syscall(SYS_gettid), 10);
	uffd_line_text(&line, " touched page ");
	uffd_line_number(&line, page, 16);
	uffd_line_text(&line, " (offset ");
	uffd_line_number(&line, page - one->start, 16);
	uffd_line_text(&line, " of the region ");
	uffd_line_number(&line, one->start, 16);
	uffd_line_text(&line, "-");
	uffd_line_number(&line, one->end, 16);
	uffd_line_text(&line, "), whose Handler was stopped because the interpreter exits: what was"
			      " not loaded by then is poisoned. End the threads that use the memory"
			      " before the program ends, or load all of it (Handler.populate)");
	uffd_line_write(&line, one->fd);
}

int uffd_shim_note_ended(uint64_t start, uint64_t length, int fd)
{
	struct ended *one = malloc(sizeof(*one));

	if (!one)
		return -ENOMEM;
	*one = (struct ended){ atomic_load(&newest), start, start + length, fd };
	while (!atomic_compare_exchange_weak(&newest, &one->next, one))
		;
	return uffd_sigbus_explain(explain);
}
