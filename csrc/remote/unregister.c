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

/* "start-end rwxp offset major:minor inode ..." */
static bool next_mapping(struct text *text, struct uffdio_range *range_ret, bool *has_file_ret)
{
	uint64_t end, inode;
	int c, sharing;

	if (next_number(text, &range_ret->start) != '-' || next_number(text, &end) != ' ')
		return false;
	range_ret->len = end - range_ret->start;
	for (unsigned int i = 0; i < 3; i++)
		next_byte(text);
	sharing = next_byte(text);
	next_byte(text);
	for (unsigned int i = 0; i < 3; i++) /* offset, major and minor number */
		next_number(text, &inode);
	c = next_number(text, &inode);
	*has_file_ret = sharing != 'p' || inode;
	while (c != '\n' && c >= 0)
		c = next_byte(text);
	return c == '\n';
}

/*
 * On Linux 6.12 any userfaultfd can unregister what is registered with another one (6.18 refuses,
 * both measured), which would fill the pages with zeros that its handler has not filled yet.  So ask
 * first.  Nothing is told without an effect: a page is protected that is unregistered next, and
 * registering finds another one's registration; memory that is registered with none is not touched.
 */
static bool may_be_ours(int uffd, const struct uffdio_range *range)
{
	uint64_t ioctls;

	return uffd_shim_writeprotect(uffd, range->start, BASE_PAGE,
				      UFFDIO_WRITEPROTECT_MODE_WP) != -ENOENT &&
	       uffd_shim_register(uffd, range->start, range->len, UFFDIO_REGISTER_MODE_WP,
				  &ioctls) != -EBUSY;
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
	bool has_file;

	if (lseek(maps_fd, 0, SEEK_SET) < 0)
		return -errno;
	while (next_mapping(&text, &found, &has_file) && found.start < end) {
		uint64_t first = higher(found.start, start);
		uint64_t last = lower(found.start + found.len, end);

		if (last <= first || has_file)
			continue;
		found = (struct uffdio_range){ first, last - first };
		if (!may_be_ours(uffd, &found))
			continue;
		if (count == TOGETHER ||
		    (count && run[count - 1].start + run[count - 1].len != first)) {
			unregister(uffd, run, count);
			count = 0;
		}
		run[count++] = found;
	}
	if (count)
		unregister(uffd, run, count);
	return text.error;
}
