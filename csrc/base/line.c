// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <unistd.h>

#include "line.h"
#include "base/poll.h"

void uffd_line_text(struct uffd_line *line, const char *text)
{
	while (*text && line->used < sizeof(line->text) - 1)
		line->text[line->used++] = *text++;
}

void uffd_line_number(struct uffd_line *line, uint64_t number, unsigned int base)
{
	char digits[24];
	size_t at = sizeof(digits);

	digits[--at] = 0;
	do
		digits[--at] = "0123456789abcdef"[number % base];
	while (number /= base);
	if (base == 16)
		uffd_line_text(line, "0x");
	uffd_line_text(line, &digits[at]);
}

bool uffd_line_can_write(int fd)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLOUT };

	return uffd_poll(&poll_fd, 1, 0) == 1 && (poll_fd.revents & POLLOUT);
}

void uffd_line_write(struct uffd_line *line, int fd)
{
	line->text[line->used++] = '\n';
	(void)!write(fd, line->text, line->used);
}
