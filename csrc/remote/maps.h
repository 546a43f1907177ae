/* SPDX-License-Identifier: MIT */
/*
 * The mappings of a process, packed: one row of numbers each, and their names in one string.
 *
 * Reading them again costs one pass over /proc/PID/maps, and comparing costs a memcmp.
 */
#ifndef UFFD_REMOTE_MAPS_H
#define UFFD_REMOTE_MAPS_H

#include <stdint.h>

#include "uffd_abi.h"

#define UFFD_MAP_READ		(1u << 0)
#define UFFD_MAP_WRITE		(1u << 1)
#define UFFD_MAP_EXECUTE	(1u << 2)
#define UFFD_MAP_SHARED		(1u << 3)

struct uffd_map {
	uint64_t start;
	uint64_t end;
	uint64_t flags;
	uint64_t offset;
	/* makedev(3) */
	uint64_t device;
	uint64_t inode;
	/* Bytes of `names`; 0 bytes: no name. */
	uint64_t name_at;
	uint64_t name_length;
};

/* All zero is empty and valid. */
struct uffd_maps {
	struct uffd_map *vec;
	uint64_t count;
	uint64_t capacity;
	char *names;
	uint64_t names_length;
	uint64_t names_capacity;
};

/* Read an open /proc/PID/maps from its beginning. -ESRCH: the process has no memory any more. */
int uffd_maps_read(int fd, struct uffd_maps *maps_ret);

/*
 * Read those that overlap ranges in ascending order, by one ioctl each. -ENOTTY: the kernel cannot
 * (before Linux 6.11); -E2BIG: they are more than @most, so that reading all of them is quicker.
 */
int uffd_maps_query(int fd, const struct uffd_page_region *vec, uint64_t count, uint64_t most,
		    struct uffd_maps *maps_ret);
void uffd_maps_free(struct uffd_maps *maps);

/*
 * The page size of the mapping that begins at an address, by an open /proc/PID/maps. -ENOTTY: the
 * kernel cannot tell (before Linux 6.11); -ENOENT: there is none.
 */
int uffd_maps_page_size(int fd, uint64_t start, uint64_t *page_size_ret);

/*
 * The mapping that holds an address, or else the next one; `fd`: an open /proc/PID/maps.
 * -ENOENT: there is none.  -ENOTTY: before Linux 6.11.
 */
int uffd_maps_next(int fd, uint64_t address, uint64_t *start_ret, uint64_t *end_ret);

#endif /* UFFD_REMOTE_MAPS_H */
