/* SPDX-License-Identifier: MIT */
/* Helpers that every file uses. */
#ifndef UFFD_ENGINE_BASE_H
#define UFFD_ENGINE_BASE_H

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

#endif /* UFFD_ENGINE_BASE_H */
