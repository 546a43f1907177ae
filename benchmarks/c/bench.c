/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Noreturn void die_at(const char *file, int line, const char *format, ...)
{
	int saved = errno;
	va_list ap;

	fprintf(stderr, "%s:%d: ", file, line);
	va_start(ap, format);
	vfprintf(stderr, format, ap);
	va_end(ap);
	fprintf(stderr, " (errno %d: %s)\n", saved, strerror(saved));
	_exit(1);
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

enum memory parse_memory(const char *name)
{
	if (!strcmp(name, "anon"))
		return ANON;
	if (!strcmp(name, "shmem"))
		return SHMEM;
	if (!strcmp(name, "hugetlb"))
		return HUGETLB;
	die("unknown memory type %s", name);
}

uint64_t page_size_of(enum memory memory)
{
	return memory == HUGETLB ? HUGE_PAGE : SMALL_PAGE;
}

uint8_t *map_memory(enum memory memory, uint64_t length, int *fd_ret)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;
	void *start;
	int fd = -1;

	if (memory != ANON) {
		unsigned int memfd_flags = MFD_CLOEXEC;

		if (memory == HUGETLB)
			memfd_flags |= MFD_HUGETLB | 21u << 26; /* MFD_HUGE_2MB */
		flags = MAP_SHARED;
		fd = memfd_create("bench", memfd_flags);
		if (fd < 0 || ftruncate(fd, (off_t)length))
			die("memfd of %llu bytes", (unsigned long long)length);
	}
	start = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (start == MAP_FAILED)
		die("mmap of %llu bytes", (unsigned long long)length);
	if (memory != HUGETLB && madvise(start, length, MADV_NOHUGEPAGE))
		die("MADV_NOHUGEPAGE");
	*fd_ret = fd;
	return start;
}

void release_memory(enum memory memory, uint8_t *start, uint64_t length)
{
	if (madvise(start, length, memory == ANON ? MADV_DONTNEED : MADV_REMOVE))
		die("release");
}

int open_uffd(int flags, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | flags);

	if (uffd < 0)
		die("userfaultfd");
	if (ioctl(uffd, UFFDIO_API, &api))
		die("UFFDIO_API");
	return uffd;
}

void register_range(int uffd, void *start, uint64_t length, uint64_t mode)
{
	struct uffdio_register reg = {
		.range = { .start = (uintptr_t)start, .len = length },
		.mode = mode,
	};

	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
}

void write_protect(int uffd, void *start, uint64_t length)
{
	struct uffdio_writeprotect wp = {
		.range = { .start = (uintptr_t)start, .len = length },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};

	if (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
		die("UFFDIO_WRITEPROTECT");
}

void serve_rounds(round_fn *round, void *context, uint64_t count)
{
	uint64_t *answer = calloc(count + 2, sizeof(*answer));
	int c;

	if (!answer)
		die("calloc");
	while ((c = getchar()) != EOF) {
		if (c != '\n')
			continue;
		answer[0] = round(context, answer + 2);
		answer[1] = count;
		if (fwrite(answer, sizeof(*answer), count + 2, stdout) != count + 2 || fflush(stdout))
			die("write");
	}
	free(answer);
}
