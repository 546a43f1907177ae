// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/array.h"
#include "remote/maps.h"

#define TEXT_FIRST (64u << 10)
#define ROWS_FIRST 256u
#define NAMES_FIRST 4096u

/* PROCMAP_QUERY (Linux 6.11, include/uapi/linux/fs.h). */
struct procmap_query {
	uint64_t size;
	uint64_t query_flags;
	uint64_t query_addr;
	uint64_t vma_start;
	uint64_t vma_end;
	uint64_t vma_flags;
	uint64_t vma_page_size;
	uint64_t vma_offset;
	uint64_t inode;
	uint32_t dev_major;
	uint32_t dev_minor;
	uint32_t vma_name_size;
	uint32_t build_id_size;
	uint64_t vma_name_addr;
	uint64_t build_id_addr;
};

_Static_assert(sizeof(struct procmap_query) == 104, "procmap_query");

#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)
/* Of query_flags; the lower bits are permissions, as in vma_flags and in UFFD_MAP_READ and so on. */
#define COVERING_OR_NEXT 0x10u
#define PERMISSIONS (UFFD_MAP_READ | UFFD_MAP_WRITE | UFFD_MAP_EXECUTE | UFFD_MAP_SHARED)
/* PATH_MAX, and what the kernel says behind a path. */
#define NAME_MOST 4352u

struct text {
	char *bytes;
	uint64_t length;
};

/* The whole file, with a NUL behind it. */
static int read_text(int fd, struct text *text)
{
	uint64_t capacity = TEXT_FIRST;
	char *bytes = malloc(capacity);
	uint64_t length = 0;

	if (!bytes)
		return -ENOMEM;
	for (;;) {
		ssize_t n = pread(fd, bytes + length, capacity - length - 1, (off_t)length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			n = -errno;
			free(bytes);
			return (int)n;
		}
		if (n == 0)
			break;
		length += (uint64_t)n;
		if (capacity - length - 1 < TEXT_FIRST / 2) {
			char *more = realloc(bytes, 2 * capacity);

			if (!more) {
				free(bytes);
				return -ENOMEM;
			}
			bytes = more;
			capacity *= 2;
		}
	}
	bytes[length] = '\0';
	*text = (struct text){ bytes, length };
	return 0;
}

static uint64_t number(const char **at, unsigned int base)
{
	uint64_t value = 0;

	for (;; (*at)++) {
		unsigned int c = (unsigned char)**at;
		unsigned int digit = c - '0';

		if (digit > 9)
			digit = c >= 'a' && c <= 'f' ? c - 'a' + 10 : base;
		if (digit >= base)
			return value;
		value = value * base + digit;
	}
}

static bool skip(const char **at, char c)
{
	if (**at != c)
		return false;
	(*at)++;
	return true;
}

/* "start-end rwxp offset major:minor inode    name" */
static bool parse(const char *at, const char *end, struct uffd_map *map, const char **name)
{
	uint64_t major, minor;

	map->start = number(&at, 16);
	if (!skip(&at, '-'))
		return false;
	map->end = number(&at, 16);
	if (!skip(&at, ' ') || end - at < 5)
		return false;
	map->flags = (at[0] == 'r' ? UFFD_MAP_READ : 0) | (at[1] == 'w' ? UFFD_MAP_WRITE : 0) |
		     (at[2] == 'x' ? UFFD_MAP_EXECUTE : 0) | (at[3] == 's' ? UFFD_MAP_SHARED : 0);
	at += 5;
	map->offset = number(&at, 16);
	if (!skip(&at, ' '))
		return false;
	major = number(&at, 16);
	if (!skip(&at, ':'))
		return false;
	minor = number(&at, 16);
	if (!skip(&at, ' '))
		return false;
	map->device = makedev((unsigned int)major, (unsigned int)minor);
	map->inode = number(&at, 10);
	while (at < end && *at == ' ')
		at++;
	*name = at;
	map->name_length = (uint64_t)(end - at);
	return map->end > map->start;
}

/*
 * Rows stay ascending and disjoint.  The kernel lists mappings piece by piece: one that grows or is
 * merged just behind what was listed comes again, from its old start on ("Track the end of the
 * reported vma to ensure position changes even if previous vma was merged", fs/proc/task_mmu.c).
 * What it says last is what was there last.
 */
static void cut(struct uffd_maps *maps, uint64_t start)
{
	struct uffd_map *last;

	while (maps->count && maps->vec[maps->count - 1].start >= start)
		maps->names_length = maps->vec[--maps->count].name_at;
	if (!maps->count)
		return;
	last = &maps->vec[maps->count - 1];
	if (last->end > start)
		last->end = start;
}

static int add(struct uffd_maps *maps, struct uffd_map *map, const char *name)
{
	int ret;

	cut(maps, map->start);
	ret = uffd_array_grow((void **)&maps->vec, &maps->capacity, maps->count + 1, ROWS_FIRST,
			      sizeof(*maps->vec));

	if (!ret)
		ret = uffd_array_grow((void **)&maps->names, &maps->names_capacity,
			   maps->names_length + map->name_length, NAMES_FIRST, 1);
	if (ret)
		return ret;
	map->name_at = maps->names_length;
	if (map->name_length)
		memcpy(maps->names + maps->names_length, name, map->name_length);
	maps->names_length += map->name_length;
	maps->vec[maps->count++] = *map;
	return 0;
}

int uffd_maps_read(int fd, struct uffd_maps *maps_ret)
{
	struct text text = { 0 };
	int ret = read_text(fd, &text);
	const char *at = text.bytes, *end = text.bytes + text.length;

	*maps_ret = (struct uffd_maps){ 0 };
	if (ret)
		return ret;
	while (!ret && at < end) {
		const char *line_end = memchr(at, '\n', (size_t)(end - at));
		struct uffd_map map = { 0 };
		const char *name = NULL;

		if (!line_end)
			line_end = end;
		if (!parse(at, line_end, &map, &name))
			ret = -EPROTO;
		else
			ret = add(maps_ret, &map, name);
		at = line_end + 1;
	}
	free(text.bytes);
	if (!ret && !maps_ret->count)
		ret = -ESRCH;
	if (ret)
		uffd_maps_free(maps_ret);
	return ret;
}

void uffd_maps_free(struct uffd_maps *maps)
{
	free(maps->vec);
	free(maps->names);
	*maps = (struct uffd_maps){ 0 };
}

static int query(int fd, uint64_t address, struct uffd_map *map, char *name)
{
	struct procmap_query query = {
		.size = sizeof(query),
		.query_flags = COVERING_OR_NEXT,
		.query_addr = address,
		.vma_name_size = NAME_MOST,
		.vma_name_addr = (uintptr_t)name,
	};

	if (ioctl(fd, PROCMAP_QUERY, &query))
		return -errno;
	*map = (struct uffd_map){
		.start = query.vma_start,
		.end = query.vma_end,
		.flags = query.vma_flags & PERMISSIONS,
		.offset = query.vma_offset,
		.device = makedev(query.dev_major, query.dev_minor),
		.inode = query.inode,
		.name_length = query.vma_name_size ? query.vma_name_size - 1 : 0,
	};
	return 0;
}

int uffd_maps_query(int fd, const struct uffd_page_region *vec, uint64_t count, uint64_t most,
		    struct uffd_maps *maps_ret)
{
	char name[NAME_MOST];
	uint64_t reached = 0;
	int ret = 0;

	*maps_ret = (struct uffd_maps){ 0 };
	for (uint64_t i = 0; !ret && i < count; i++) {
		uint64_t at = vec[i].start > reached ? vec[i].start : reached;

		while (!ret && at < vec[i].end) {
			struct uffd_map map = { 0 };

			ret = query(fd, at, &map, name);
			if (ret || map.start >= vec[i].end)
				break;
			ret = maps_ret->count < most ? add(maps_ret, &map, name) : -E2BIG;
			at = reached = map.end;
		}
		if (ret == -ENOENT)
			ret = 0; /* no mapping from there on */
	}
	if (ret)
		uffd_maps_free(maps_ret);
	return ret;
}

int uffd_maps_next(int fd, uint64_t address, uint64_t *start_ret, uint64_t *end_ret)
{
	struct procmap_query query = {
		.size = sizeof(query),
		.query_flags = COVERING_OR_NEXT,
		.query_addr = address,
	};

	if (ioctl(fd, PROCMAP_QUERY, &query))
		return -errno;
	*start_ret = query.vma_start;
	*end_ret = query.vma_end;
	return 0;
}

int uffd_maps_page_size(int fd, uint64_t start, uint64_t *page_size_ret)
{
	struct procmap_query query = { .size = sizeof(query), .query_addr = start };

	*page_size_ret = 0;
	if (ioctl(fd, PROCMAP_QUERY, &query))
		return -errno;
	*page_size_ret = query.vma_page_size;
	return 0;
}
