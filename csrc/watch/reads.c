// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <stdatomic.h>

#include "reads.h"
#include "uffd_shim.h"

#define COUNTERS	64u

static _Atomic uint32_t reads[COUNTERS];

uint32_t uffd_reads_of(int fd)
{
	return atomic_load(&reads[(uint32_t)fd % COUNTERS]);
}

void uffd_reads_note(int fd)
{
	atomic_fetch_add(&reads[(uint32_t)fd % COUNTERS], 1);
}

int64_t uffd_reads_read(int fd, void *buffer, uint64_t size)
{
	int64_t n = uffd_shim_read(fd, buffer, size);

	if (n > 0)
		uffd_reads_note(fd);
	return n;
}
