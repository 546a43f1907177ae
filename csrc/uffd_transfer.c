// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "uffd_transfer.h"
#include "base/poll.h"

static int wait_for(int fd, short events)
{
	struct pollfd ready = { .fd = fd, .events = events };

	return uffd_poll(&ready, 1, -1) < 0 ? -errno : 0;
}

int uffd_transfer_poll(const int32_t *fds, int16_t *events, uint32_t count, int32_t timeout_ms)
{
	struct pollfd each[UFFD_POLL_MOST];
	int ready;

	if (count > UFFD_POLL_MOST)
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++)
		each[i] = (struct pollfd){ .fd = fds[i], .events = events[i] };
	ready = uffd_poll(each, count, timeout_ms);
	if (ready < 0)
		return -errno;
	for (uint32_t i = 0; i < count; i++)
		events[i] = each[i].revents;
	return ready;
}

int uffd_transfer_read(int fd, int64_t at, void *target, uint64_t length, uint64_t *done)
{
	while (*done < length) {
		char *to = (char *)target + *done;
		ssize_t n = at < 0 ? read(fd, to, length - *done)
				   : pread(fd, to, length - *done, at + (int64_t)*done);
		int r = n < 0 ? -errno : n ? 0 : -ENODATA;

		if (n > 0)
			*done += (uint64_t)n;
		if (r == -EAGAIN)
			r = wait_for(fd, POLLIN);
		if (r)
			return r;
	}
	return 0;
}

int uffd_transfer_write(int fd, int64_t at, const void *source, uint64_t length, uint64_t *done)
{
	while (*done < length) {
		const char *from = (const char *)source + *done;
		ssize_t n = at < 0 ? write(fd, from, length - *done)
				   : pwrite(fd, from, length - *done, at + (int64_t)*done);
		int r = n < 0 ? -errno : n ? 0 : -EIO;

		if (n > 0)
			*done += (uint64_t)n;
		if (r == -EAGAIN)
			r = wait_for(fd, POLLOUT);
		if (r)
			return r;
	}
	return 0;
}
