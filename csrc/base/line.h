/* SPDX-License-Identifier: MIT */
/* Build a line for stderr without malloc.  Async-signal-safe. */
#ifndef UFFD_LINE_H
#define UFFD_LINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define UFFD_LINE_SIZE	768

struct uffd_line {
	char text[UFFD_LINE_SIZE];
	size_t used;
};

/* Text that does not fit is cut off; there is always room for the newline. */
void uffd_line_text(struct uffd_line *line, const char *text);
/* In base 10, or in base 16 with a leading 0x. */
void uffd_line_number(struct uffd_line *line, uint64_t number, unsigned int base);
/* Whether a write would not block: forks and close() wait for the thread that watches. */
bool uffd_line_can_write(int fd);
/* Write the line and a newline. */
void uffd_line_write(struct uffd_line *line, int fd);

#endif /* UFFD_LINE_H */
