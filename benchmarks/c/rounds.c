// SPDX-License-Identifier: MIT
/*
 * rounds PID: one PAGEMAP_SCAN of each mapping of another process that is registered for write
 * protection, which reports the written pages and protects them again.
 *
 * The mappings are those of when it starts.  Whoever registered them has to do so before.
 */
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#define RANGES 65536u

struct rounds {
	int pagemap;
	uint64_t count;
	struct {
		uint64_t start;
		uint64_t end;
	} *mappings;
	struct uffd_page_region *out;
};

static long scan(const struct rounds *rounds, uint64_t start, uint64_t end)
{
	struct uffd_pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = UFFD_PM_SCAN_WP_MATCHING | UFFD_PM_SCAN_CHECK_WPASYNC,
		.start = start,
		.end = end,
		.vec = (uintptr_t)rounds->out,
		.vec_len = RANGES,
		.category_mask = UFFD_PAGE_IS_WRITTEN,
		.return_mask = UFFD_PAGE_IS_WRITTEN,
	};

	return ioctl(rounds->pagemap, UFFD_PAGEMAP_SCAN, &arg);
}

/* Keep those mappings that a scan accepts. */
static void read_mappings(struct rounds *rounds, const char *pid)
{
	char line[4096], path[64];
	uint64_t capacity = 0;
	FILE *maps;

	snprintf(path, sizeof(path), "/proc/%s/maps", pid);
	maps = fopen(path, "re");
	if (!maps)
		die("%s", path);
	while (fgets(line, sizeof(line), maps)) {
		char *at;
		uint64_t start = strtoull(line, &at, 16), end = strtoull(at + 1, NULL, 16);

		if (scan(rounds, start, end) < 0) {
			/* Not registered, or [vsyscall]. */
			if (errno != EPERM && errno != EFAULT)
				die("PAGEMAP_SCAN of %s", line);
			continue;
		}
		if (rounds->count == capacity) {
			capacity = capacity ? 2 * capacity : 1024;
			rounds->mappings = realloc(rounds->mappings,
						   capacity * sizeof(*rounds->mappings));
			if (!rounds->mappings)
				die("realloc");
		}
		rounds->mappings[rounds->count].start = start;
		rounds->mappings[rounds->count++].end = end;
	}
	fclose(maps);
	if (!rounds->count)
		die("no mapping of process %s is registered", pid);
}

static uint64_t run_round(void *context, uint64_t *samples)
{
	const struct rounds *rounds = context;
	uint64_t begin_ns = now_ns();

	for (uint64_t i = 0; i < rounds->count; i++)
		if (scan(rounds, rounds->mappings[i].start, rounds->mappings[i].end) < 0)
			die("PAGEMAP_SCAN");
	samples[0] = now_ns() - begin_ns;
	return samples[0];
}

int main(int argc, char **argv)
{
	struct rounds rounds = { 0 };
	char path[64];

	if (argc != 2)
		die("usage: rounds PID");
	snprintf(path, sizeof(path), "/proc/%s/pagemap", argv[1]);
	rounds.pagemap = open(path, O_RDONLY | O_CLOEXEC);
	if (rounds.pagemap < 0)
		die("%s", path);
	rounds.out = malloc(RANGES * sizeof(*rounds.out));
	if (!rounds.out)
		die("malloc");
	read_mappings(&rounds, argv[1]);
	serve_rounds(run_round, &rounds, 1);
	return 0;
}
