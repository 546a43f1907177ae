/* SPDX-License-Identifier: MIT */
/*
 * Where the content of each page of a mapping is: mapped, in the page cache, on swap, nowhere.
 *
 * Nothing here touches the memory it looks at, so nothing can fault there.
 */
#ifndef UFFD_RESIDENCY_H
#define UFFD_RESIDENCY_H

#include <stdint.h>

#include "uffd_abi.h"

/* Where a page of a mapping is; the values are PageResidency's in Python. */
enum uffd_residency {
	UFFD_RESIDENCY_HOLE,
	UFFD_RESIDENCY_SWAPPED,
	UFFD_RESIDENCY_RESIDENT,
	UFFD_RESIDENCY_MAPPED,
	UFFD_RESIDENCY_PRIVATE,
	UFFD_RESIDENCY_POISON,
	UFFD_RESIDENCY_UNKNOWN,
};

/* Facts about a mapping, for uffd_residency_of(). */
#define UFFD_MAPPING_SHARED	(1u << 0) /* MAP_SHARED: its PTEs never hold swap entries */
#define UFFD_MAPPING_FILE	(1u << 1) /* backed by a page cache (file, shmem, hugetlb) */
#define UFFD_MAPPING_MINCORE	(1u << 2) /* mincore(2) is reliable on it */
#define UFFD_MAPPING_SEEK	(1u << 3) /* SEEK_DATA and SEEK_HOLE are reliable on file_fd */

/*
 * Write one enum uffd_residency per page of @page_size bytes, for a range inside one mapping of
 * this process, which maps @file_fd (-1: no file) from @offset on. Moves file_fd's position.
 */
int uffd_residency_of(int pagemap_fd, uint64_t start, uint64_t length, uint64_t page_size,
		      int file_fd, uint64_t offset, uint32_t mapping, uint8_t *states_ret);

#endif /* UFFD_RESIDENCY_H */
