// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/poll.h"

#define MOST_FDS	(1u << 15)
#define WORD_BITS	(sizeof(unsigned long) * CHAR_BIT)
/* Between looks at descriptors with numbers above MOST_FDS. */
#define LOOK_MS		10

struct fds {
	unsigned long words[MOST_FDS / WORD_BITS];
};

static unsigned long *word_of(struct fds *set, int fd)
{
	return &set->words[(unsigned int)fd / WORD_BITS];
}

static unsigned long bit_of(int fd)
{
	return 1ul << ((unsigned int)fd % WORD_BITS);
}

static bool is_in(struct fds *set, int fd)
{
	return *word_of(set, fd) & bit_of(fd);
}

/* select(2) does not look at the limit.  The macros of its header allow for 1,024 descriptors only. */
static int by_select(struct pollfd *fds, unsigned int count, int timeout_ms)
{
	struct timespec limit = {
		.tv_sec = timeout_ms / 1000,
		.tv_nsec = timeout_ms % 1000 * 1000000l,
	};
	struct fds in = { 0 }, out = { 0 };
	int end = 0, ready = 0, ret;

	for (unsigned int i = 0; i < count; i++) {
		fds[i].revents = 0;
		if (fds[i].fd < 0)
			continue;
		if ((unsigned int)fds[i].fd >= MOST_FDS)
			return poll(NULL, 0, LOOK_MS);
		if (fds[i].events & POLLIN)
			*word_of(&in, fds[i].fd) |= bit_of(fds[i].fd);
		if (fds[i].events & POLLOUT)
			*word_of(&out, fds[i].fd) |= bit_of(fds[i].fd);
		if (fds[i].fd >= end)
			end = fds[i].fd + 1;
	}
	ret = (int)syscall(SYS_pselect6, end, &in, &out, NULL, timeout_ms < 0 ? NULL : &limit, NULL);
	if (ret < 0)
		return ret;
	for (unsigned int i = 0; ret && i < count; i++) {
		if (fds[i].fd < 0)
			continue;
		if (is_in(&in, fds[i].fd))
			fds[i].revents |= POLLIN;
		if (is_in(&out, fds[i].fd))
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
