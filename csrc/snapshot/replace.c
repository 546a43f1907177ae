// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "uffd_pagemap.h"
#include "uffd_shim.h"
#include "snapshot/replace.h"

#define PAGES_AT_ONCE	512u
#define PAGE_SHIFT	12
#define READ_WRITE	(PROT_READ | PROT_WRITE)
#define OVER		(MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE)

/* Before Linux 6.7 there is no PAGEMAP_SCAN. */
static int read_table(int fd, uint64_t start, uint64_t length)
{
	uint64_t entries[PAGES_AT_ONCE], pages = length >> PAGE_SHIFT, read;

	while (pages) {
		uint64_t most = pages < PAGES_AT_ONCE ? pages : PAGES_AT_ONCE;
		int r = uffd_pagemap_read(fd, start, most, entries, &read);

		if (r)
			return r;
		for (uint64_t i = 0; i < read; i++)
			if (entries[i] & (UFFD_PM_PRESENT | UFFD_PM_SWAP))
				return -EEXIST;
		start += read << PAGE_SHIFT;
		pages -= read;
	}
	return 0;
}

static int look(int fd, const uint64_t *spans, uint64_t count, uint64_t *at_ret)
{
	uint64_t index;
	int r = uffd_pagemap_first_of(fd, spans, count,
				      UFFD_PAGE_IS_PRESENT | UFFD_PAGE_IS_SWAPPED, &index);

	if (r == 0 && index < count)
		r = -EEXIST;
	if (r == -ENOTTY || r == -EINVAL)
		for (index = 0, r = 0; r == 0 && index < count; index += r == 0)
			r = read_table(fd, spans[2 * index], spans[2 * index + 1]);
	if (r)
		*at_ret = spans[2 * index];
	return r;
}

/* Some of the memory may have been mapped over: MAP_FIXED ends the registration of that. */
static void let_go(int uffd, const uint64_t *spans, uint64_t count,
		   const struct uffd_replacement *vec, uint64_t mapped)
{
	const struct uffd_replacement *end = vec + mapped;

	for (; count--; spans += 2) {
		uint64_t at = spans[0], past = at + spans[1];

		for (; vec < end && vec->start >= at && vec->start < past; vec++) {
			if (vec->start > at)
				uffd_shim_unregister(uffd, at, vec->start - at);
			at = vec->start + vec->length;
		}
		if (at < past)
			uffd_shim_unregister(uffd, at, past - at);
		uffd_shim_wake(uffd, spans[0], spans[1]);
	}
}

static int map_all(const struct uffd_replacement *vec, uint64_t count, uint64_t *mapped_ret)
{
	uint64_t ignored;
	int r = 0;

	for (*mapped_ret = 0; *mapped_ret < count; ++*mapped_ret) {
		const struct uffd_replacement *each = &vec[*mapped_ret];

		r = uffd_shim_mmap(each->start, each->length, READ_WRITE, OVER, (int)each->fd,
				   each->offset, &ignored);
		if (r)
			break;
	}
	/* mmap(2) may have unmapped what was there before it failed. */
	for (uint64_t i = 0; r && i <= *mapped_ret; i++)
		uffd_shim_mmap(vec[i].start, vec[i].length, READ_WRITE, OVER | MAP_ANONYMOUS, -1, 0,
			       &ignored);
	return r;
}

int uffd_replace_untouched(int uffd, int pagemap_fd, const uint64_t *spans, uint64_t count,
			   const struct uffd_replacement *vec, uint64_t vec_count,
			   uint32_t *step_ret, uint64_t *at_ret)
{
	uint64_t registered = 0, mapped = 0, ioctls;
	int r = 0;

	*step_ret = UFFD_REPLACE_REGISTER;
	for (; uffd >= 0 && r == 0 && registered < count; registered += r == 0) {
		*at_ret = spans[2 * registered];
		r = uffd_shim_register(uffd, *at_ret, spans[2 * registered + 1],
				       UFFDIO_REGISTER_MODE_MISSING, &ioctls);
	}
	if (r == 0 && pagemap_fd >= 0) {
		*step_ret = UFFD_REPLACE_LOOK;
		r = look(pagemap_fd, spans, count, at_ret);
	}
	if (r == 0) {
		*step_ret = UFFD_REPLACE_MAP;
		r = map_all(vec, vec_count, &mapped);
		if (r)
			*at_ret = vec[mapped].start;
	}
	/* A fork that was made meanwhile may keep the userfaultfd open. */
	let_go(uffd, spans, registered, vec, mapped);
	return r;
}
