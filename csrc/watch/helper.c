// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <poll.h>

#include "helper.h"
#include "base/line.h"

bool uffd_helper_can_say(int fd)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLOUT };

	return poll(&poll_fd, 1, 0) == 1 && (poll_fd.revents & POLLOUT);
}

bool uffd_helper_say_end(int pidfd, int32_t pid, int say_fd)
{
	struct pollfd poll_fd = { .fd = pidfd, .events = POLLIN };
	struct uffd_line line = { .used = 0 };

	if (poll(&poll_fd, 1, 0) != 1 || !(poll_fd.revents & POLLIN) ||
	    !uffd_helper_can_say(say_fd))
		return false;
	uffd_line_text(&line, "pyuffd: the helper process ");
	uffd_line_number(&line, (uint64_t)pid, 10);
	uffd_line_text(&line, " of a Handler has ended, perhaps killed: threads that touch missing"
			      " pages wait until stop() poisons them");
	uffd_line_write(&line, say_fd);
	return true;
}
