/* SPDX-License-Identifier: MIT */
/* What the bare C programs share: opening a userfaultfd, mapping memory, answering the harness. */
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>

#include "uffd_abi.h"

#define SMALL_PAGE 4096u
#define HUGE_PAGE (2u << 20)

#define die(...) die_at(__FILE__, __LINE__, __VA_ARGS__)
_Noreturn void die_at(const char *file, int line, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

uint64_t now_ns(void);

enum memory { ANON, SHMEM, HUGETLB };
enum memory parse_memory(const char *name);
uint64_t page_size_of(enum memory memory);

/* Map `length` bytes; *fd_ret is the memfd (-1 for anonymous memory). */
uint8_t *map_memory(enum memory memory, uint64_t length, int *fd_ret);
/* Drop every page of the mapping, so that the next touch faults. */
void release_memory(enum memory memory, uint8_t *start, uint64_t length);

int open_uffd(int flags, uint64_t features);
void register_range(int uffd, void *start, uint64_t length, uint64_t mode);
void write_protect(int uffd, void *start, uint64_t length);

/*
 * Answer the harness: for each line on standard input call `round`, which returns the wall time and
 * fills in the samples, and write (wall, count, samples) as native 64-bit numbers. Ends at end of
 * file.
 */
typedef uint64_t round_fn(void *context, uint64_t *samples);
void serve_rounds(round_fn *round, void *context, uint64_t count);

#endif
