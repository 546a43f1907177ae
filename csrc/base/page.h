/* SPDX-License-Identifier: MIT */
/* The size of a page, and the lower and the higher of two numbers. */
#ifndef UFFD_PAGE_H
#define UFFD_PAGE_H

#include <stdint.h>

#define BASE_PAGE	4096u

static inline uint64_t lower(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t higher(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

#endif /* UFFD_PAGE_H */
