/* SPDX-License-Identifier: MIT */
/*
 * fill MEMORY LENGTH HOW: fill a registered region in order, by UFFDIO_COPY.
 *
 * HOW  ahead   2 MiB at a time. The wall time is that of the copies alone. The one sample of a
 *              round is that plus the time a thread needs to read one byte of every page afterwards.
 *      lazily  another thread reads one byte of every page meanwhile. The first fault starts the
 *              copies, of as much at a time as the engine copies for a sequential reader. The wall
 *              time and the sample are those of the reader.
 */
#include "bench.h"
#include "toucher.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* SEQUENTIAL_SLICE of csrc/engine/prefetch.c */
#define LAZY_PIECE (8u << 20)

struct fill {
	enum memory memory;
	bool lazily;
	uint64_t length;
	uint8_t *source;
	uint32_t *order;
};

struct copies {
	const struct fill *fill;
	uint8_t *start;
	int uffd;
};

static void copy_all(const struct copies *copies, uint64_t piece)
{
	uint64_t length = copies->fill->length;

	for (uint64_t offset = 0; offset < length; offset += piece) {
		struct uffdio_copy copy = {
			.dst = (uintptr_t)copies->start + offset,
			.src = (uintptr_t)copies->fill->source + offset,
			.len = length - offset < piece ? length - offset : piece,
		};

		if (ioctl(copies->uffd, UFFDIO_COPY, &copy))
			die("UFFDIO_COPY");
	}
}

/* The end of each ioctl wakes the reader, so its further faults need not be read. */
static void *copy_on_fault(void *argument)
{
	const struct copies *copies = argument;
	struct uffd_msg message;

	if (read(copies->uffd, &message, sizeof(message)) != sizeof(message))
		die("read");
	copy_all(copies, LAZY_PIECE);
	return NULL;
}

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
	struct copies copies = { fill, start, uffd };
	pthread_t thread;

	memset(start, 1, fill->length);
	release_memory(fill->memory, start, fill->length);
	register_range(uffd, start, fill->length, UFFDIO_REGISTER_MODE_MISSING);

	if (fill->lazily) {
		if (pthread_create(&thread, NULL, copy_on_fault, &copies))
			die("pthread_create");
		if (touch_run(&job, 1, &copies_ns))
			die("touch_run");
		pthread_join(thread, NULL);
		samples[0] = copies_ns;
	} else {
		begin_ns = now_ns();
		copy_all(&copies, HUGE_PAGE);
		copies_ns = now_ns() - begin_ns;
		if (touch_run(&job, 1, &touches_ns))
			die("touch_run");
		samples[0] = copies_ns + touches_ns;
	}

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

	if (argc != 4)
		die("usage: fill MEMORY LENGTH HOW");
	fill.memory = parse_memory(argv[1]);
	fill.length = strtoull(argv[2], NULL, 0);
	fill.lazily = !strcmp(argv[3], "lazily");
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
