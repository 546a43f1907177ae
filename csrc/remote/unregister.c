// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <unistd.h>

#include "base/page.h"
#include "remote/unregister.h"
#include "uffd_shim.h"

/* Adjacent mappings that are unregistered together. */
#define TOGETHER 256u

struct text {
	int fd;
	int error;
	char bytes[4096];
	uint64_t at, length;
};

/* The next byte, or -1 at the end. */
static int next_byte(struct text *text)
{
	if (text->at == text->length) {
		ssize_t n;

		do
			n = read(text->fd, text->bytes, sizeof(text->bytes));
		while (n < 0 && errno == EINTR);
		if (n <= 0) {
			text->error = n ? -errno : 0;
			return -1;
		}
		text->at = 0;
		text->length = (uint64_t)n;
	}
	return (unsigned char)text->bytes[text->at++];
}

/* A hexadecimal number, and the byte behind it. */
static int next_number(struct text *text, uint64_t *number_ret)
{
	for (*number_ret = 0;;) {
		int c = next_byte(text);

		if (c >= '0' && c <= '9')
			*number_ret = *number_ret << 4 | (uint64_t)(c - '0');
		else if (c >= 'a' && c <= 'f')
			*number_ret = *number_ret << 4 | (uint64_t)(c - 'a' + 10);
		else
			return c;
	}
}

/* "start-end ..." */
static bool next_mapping(struct text *text, struct uffdio_range *range_ret)
{
	uint64_t end;
	int c;

	if (next_number(text, &range_ret->start) != '-' || next_number(text, &end) != ' ')
		return false;
	range_ret->len = end - range_ret->start;
	do
		c = next_byte(text);
	while (c != '\n' && c >= 0);
	return c == '\n';
}

static void unregister(int uffd, const struct uffdio_range *vec, uint64_t count)
{
	uint64_t start = vec[0].start, length = vec[count - 1].start + vec[count - 1].len - start;

	if (uffd_shim_unregister(uffd, start, length))
		for (uint64_t i = 0; count > 1 && i < count; i++)
			uffd_shim_unregister(uffd, vec[i].start, vec[i].len);
	/* Unregistering memory that is registered for write-protection only wakes nobody. */
	uffd_shim_wake(uffd, start, length);
}

int uffd_unregister_mappings(int uffd, int maps_fd, uint64_t start, uint64_t end)
{
	struct uffdio_range run[TOGETHER], found;
	struct text text = { .fd = maps_fd };
	uint64_t count = 0;

	if (lseek(maps_fd, 0, SEEK_SET) < 0)
		return -errno;
	while (next_mapping(&text, &found) && found.start < end) {
		uint64_t first = higher(found.start, start);
		uint64_t last = lower(found.start + found.len, end);

		if (last <= first)
			continue;
		if (count == TOGETHER ||
		    (count && run[count - 1].start + run[count - 1].len != first)) {
			unregister(uffd, run, count);
			count = 0;
		}
		run[count++] = (struct uffdio_range){ first, last - first };
	}
	if (count)
		unregister(uffd, run, count);
	return text.error;
}
