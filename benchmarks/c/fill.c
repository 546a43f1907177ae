/* SPDX-License-Identifier: MIT */
/*
 * fill MEMORY LENGTH: fill a registered region in order, by UFFDIO_COPYs of 2 MiB.
 *
 * The wall time is that of the copies alone. The one sample of a round is that plus the time a
 * thread needs to read one byte of every page afterwards.
 */
#include "bench.h"
#include "toucher.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

struct fill {
	enum memory memory;
	uint64_t length;
	uint8_t *source;
	uint32_t *order;
};

static uint64_t run_round(void *context, uint64_t *samples)
{
	const struct fill *fill = context;
	uint64_t page_size = page_size_of(fill->memory);
	uint64_t begin_ns, copies_ns, touches_ns;
	int fd, uffd = open_uffd(0, 0);
	uint8_t *start = map_memory(fill->memory, fill->length, &fd);
	struct touch_job job = {
		.base = start,
		.order = fill->order,
		.count = fill->length / page_size,
		.page_size = page_size,
		.cpu = -1,
	};

	memset(start, 1, fill->length);
	release_memory(fill->memory, start, fill->length);
	register_range(uffd, start, fill->length, UFFDIO_REGISTER_MODE_MISSING);

	begin_ns = now_ns();
	for (uint64_t offset = 0; offset < fill->length; offset += HUGE_PAGE) {
		struct uffdio_copy copy = {
			.dst = (uintptr_t)start + offset,
			.src = (uintptr_t)fill->source + offset,
			.len = HUGE_PAGE,
		};

		if (ioctl(uffd, UFFDIO_COPY, &copy))
			die("UFFDIO_COPY");
	}
	copies_ns = now_ns() - begin_ns;
	if (touch_run(&job, 1, &touches_ns))
		die("touch_run");
	samples[0] = copies_ns + touches_ns;

	munmap(start, fill->length);
	if (fd >= 0)
		close(fd);
	close(uffd);
	return copies_ns;
}

int main(int argc, char **argv)
{
	struct fill fill;
	int fd;

	if (argc != 3)
		die("usage: fill MEMORY LENGTH");
	fill.memory = parse_memory(argv[1]);
	fill.length = strtoull(argv[2], NULL, 0);
	if (!fill.length || fill.length % HUGE_PAGE)
		die("the length must be a multiple of 2 MiB");
	fill.source = map_memory(ANON, fill.length, &fd);
	memset(fill.source, 1, fill.length);
	fill.order = calloc(fill.length / page_size_of(fill.memory), sizeof(*fill.order));
	if (!fill.order)
		die("calloc");
	touch_order(fill.order, fill.length / page_size_of(fill.memory), 0);
	serve_rounds(run_round, &fill, 1);
	return 0;
}
