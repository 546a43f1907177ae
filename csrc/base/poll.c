// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/poll.h"

#define MOST_FDS	(1 << 15)
#define WORD_BITS	((int)(sizeof(unsigned long) * CHAR_BIT))
/* Between looks at descriptors with numbers above MOST_FDS. */
#define LOOK_MS		10

static unsigned long bit_of(int fd)
{
	return 1ul << (fd % WORD_BITS);
}

/*
 * select(2) does not look at the limit.  The macros of its header allow for 1,024 descriptors only.
 * The sets are no longer than needed: this may run on the small stack of a signal handler.
 */
static int by_select(struct pollfd *fds, unsigned int count, int timeout_ms)
{
	struct timespec limit = {
		.tv_sec = timeout_ms / 1000,
		.tv_nsec = timeout_ms % 1000 * 1000000l,
	};
	int end = 1, ready = 0, ret;

	for (unsigned int i = 0; i < count; i++) {
		fds[i].revents = 0;
		if (fds[i].fd >= end)
			end = fds[i].fd + 1;
	}
	if (end > MOST_FDS)
		return poll(NULL, 0, LOOK_MS);

	unsigned long in[(end - 1) / WORD_BITS + 1], out[(end - 1) / WORD_BITS + 1];

	memset(in, 0, sizeof(in));
	memset(out, 0, sizeof(out));
	for (unsigned int i = 0; i < count; i++) {
		if (fds[i].fd >= 0 && fds[i].events & POLLIN)
			in[fds[i].fd / WORD_BITS] |= bit_of(fds[i].fd);
		if (fds[i].fd >= 0 && fds[i].events & POLLOUT)
			out[fds[i].fd / WORD_BITS] |= bit_of(fds[i].fd);
	}
	ret = (int)syscall(SYS_pselect6, end, in, out, NULL, timeout_ms < 0 ? NULL : &limit, NULL);
	if (ret <= 0)
		return ret;
	for (unsigned int i = 0; i < count; i++) {
		if (fds[i].fd < 0)
			continue;
		if (in[fds[i].fd / WORD_BITS] & bit_of(fds[i].fd))
			fds[i].revents |= POLLIN;
		if (out[fds[i].fd / WORD_BITS] & bit_of(fds[i].fd))
			fds[i].revents |= POLLOUT;
		ready += !!fds[i].revents;
	}
	return ready;
}

int uffd_poll(struct pollfd *fds, unsigned int count, int timeout_ms)
{
	int ret = poll(fds, count, timeout_ms);

	return ret < 0 && errno == EINVAL ? by_select(fds, count, timeout_ms) : ret;
}
