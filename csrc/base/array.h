/* SPDX-License-Identifier: MIT */
/* Arrays that grow: at least twice as large each time. */
#ifndef UFFD_ARRAY_H
#define UFFD_ARRAY_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* Make room for `wanted` elements of `size` bytes, and for `first` to begin with; -ENOMEM. */
static inline int uffd_array_grow(void **array, uint64_t *capacity, uint64_t wanted, uint64_t first,
				  size_t size)
{
	uint64_t more = *capacity ? *capacity : first;
	void *moved;

	if (wanted <= *capacity)
		return 0;
	while (more < wanted)
		more *= 2;
	moved = realloc(*array, more * size);
	if (!moved)
		return -ENOMEM;
	*array = moved;
	*capacity = more;
	return 0;
}

#endif /* UFFD_ARRAY_H */
