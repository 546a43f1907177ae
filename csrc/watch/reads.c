// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "reads.h"
#include "uffd_shim.h"

#define COUNTERS	64u

static _Atomic uint32_t reads[COUNTERS];
/* Each: a descriptor and the thread that read it last. */
static _Atomic uint64_t readers[COUNTERS];

uint32_t uffd_reads_of(int fd)
{
	return atomic_load(&reads[(uint32_t)fd % COUNTERS]);
}

int32_t uffd_reads_reader(int fd)
{
	uint64_t reader = atomic_load(&readers[(uint32_t)fd % COUNTERS]);

	return reader >> 32 == (uint32_t)fd ? (int32_t)(uint32_t)reader : 0;
}

void uffd_reads_note(int fd)
{
	uint32_t thread_id = (uint32_t)syscall(SYS_gettid);

	atomic_store(&readers[(uint32_t)fd % COUNTERS], (uint64_t)(uint32_t)fd << 32 | thread_id);
	atomic_fetch_add(&reads[(uint32_t)fd % COUNTERS], 1);
}

int64_t uffd_reads_read(int fd, void *buffer, uint64_t size)
{
	int64_t n = uffd_shim_read(fd, buffer, size);

	if (n > 0)
		uffd_reads_note(fd);
	return n;
}
