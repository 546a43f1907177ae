// SPDX-License-Identifier: MIT
/*
 * arm COUNT: register and protect COUNT mappings of one page each of its own, and read smaps once;
 * then unregister them.  The samples are the time of the first part and that of the second.
 */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* The next page is not mapped. */
#define STEP (2 * SMALL_PAGE)
#define FEATURES (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED)

struct arm {
	int uffd;
	uint64_t count;
	uint8_t *start;
};

static void read_smaps(void)
{
	static char buffer[1 << 16];
	FILE *file = fopen("/proc/self/smaps", "re");

	if (!file)
		die("smaps");
	while (fread(buffer, 1, sizeof(buffer), file))
		;
	fclose(file);
}

static uint64_t run_round(void *context, uint64_t *samples)
{
	const struct arm *arm = context;
	uint64_t begin_ns = now_ns(), armed_ns;

	for (uint64_t i = 0; i < arm->count; i++)
		register_range(arm->uffd, arm->start + i * STEP, SMALL_PAGE,
			       UFFDIO_REGISTER_MODE_WP);
	for (uint64_t i = 0; i < arm->count; i++)
		write_protect(arm->uffd, arm->start + i * STEP, SMALL_PAGE);
	read_smaps();
	armed_ns = now_ns();
	for (uint64_t i = 0; i < arm->count; i++) {
		struct uffdio_range range = { (uintptr_t)arm->start + i * STEP, SMALL_PAGE };

		if (ioctl(arm->uffd, UFFDIO_UNREGISTER, &range))
			die("UFFDIO_UNREGISTER");
	}
	samples[0] = armed_ns - begin_ns;
	samples[1] = now_ns() - armed_ns;
	return samples[0] + samples[1];
}

int main(int argc, char **argv)
{
	struct arm arm = { 0 };
	int fd;

	if (argc != 2)
		die("usage: arm COUNT");
	arm.count = strtoull(argv[1], NULL, 10);
	arm.start = map_memory(ANON, arm.count * STEP, &fd);
	for (uint64_t i = 0; i < arm.count; i++) {
		arm.start[i * STEP] = 1;
		if (munmap(arm.start + i * STEP + SMALL_PAGE, SMALL_PAGE))
			die("munmap");
	}
	arm.uffd = open_uffd(0, FEATURES);
	serve_rounds(run_round, &arm, 2);
	return 0;
}
