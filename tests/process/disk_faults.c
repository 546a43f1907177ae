// SPDX-License-Identifier: MIT
/*
 * LD_PRELOAD library: a disk that fails or is slow, for files named "pages".  Writes fail with
 * DISK_ERRNO after DISK_BYTES bytes; each takes DISK_US microseconds.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static _Atomic long written;

static long number(const char *name)
{
	const char *text = getenv(name);

	return text ? atol(text) : 0;
}

/* Whether the write fails. */
static int fails(int fd, size_t length)
{
	char link[40], path[4096];
	ssize_t n;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, path, sizeof(path) - 1);
	if (n < 6)
		return 0;
	path[n] = '\0';
	if (strcmp(path + n - 6, "/pages"))
		return 0;
	usleep((useconds_t)number("DISK_US"));
	if (!number("DISK_ERRNO") || atomic_fetch_add(&written, (long)length) < number("DISK_BYTES"))
		return 0;
	errno = (int)number("DISK_ERRNO");
	return 1;
}

ssize_t pwrite(int fd, const void *from, size_t length, off_t offset)
{
	ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");

	return fails(fd, length) ? -1 : real(fd, from, length, offset);
}

ssize_t pwrite64(int fd, const void *from, size_t length, off_t offset)
{
	return pwrite(fd, from, length, offset);
}

ssize_t pwritev(int fd, const struct iovec *vec, int count, off_t offset)
{
	ssize_t (*real)(int, const struct iovec *, int, off_t) = dlsym(RTLD_NEXT, "pwritev");

	return fails(fd, (size_t)count * 4096) ? -1 : real(fd, vec, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec *vec, int count, off_t offset)
{
	return pwritev(fd, vec, count, offset);
}
