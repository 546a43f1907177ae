/* SPDX-License-Identifier: MIT */
/*
 * Another process's memory: copied in bulk by process_vm_readv(2) and compared by kcmp(2).
 */
#ifndef UFFD_REMOTE_MEMORY_H
#define UFFD_REMOTE_MEMORY_H

#include <stdint.h>

#include "uffd_pagemap.h"

/*
 * Where the bytes at an address go: packed, one range behind the other, if `base` is
 * UFFD_PACKED; else `address - base` bytes behind the beginning.
 */
#define UFFD_PACKED UINT64_MAX

/*
 * Copy ranges to memory of `size` bytes. A page that cannot be read (unmapped, poisoned, behind
 * the end of its file) is appended to `lost_ret`, and zeros take its place.
 * -ESRCH: the process is gone; -ENOSPC: `size` is too small for them. copied_ret: bytes in place,
 * lost ones included, also after an error.
 */
int uffd_remote_read(int32_t pid, const struct uffd_page_region *vec, uint64_t count, void *target,
		     uint64_t size, uint64_t base, struct uffd_page_ranges *lost_ret,
		     uint64_t *copied_ret);

/* The same to a file, from an offset on. */
int uffd_remote_read_to_file(int32_t pid, const struct uffd_page_region *vec, uint64_t count,
			     int fd, uint64_t offset, uint64_t base,
			     struct uffd_page_ranges *lost_ret, uint64_t *copied_ret);

/* process_vm_writev(2) of one range; bytes or -errno. */
int64_t uffd_remote_write(int32_t pid, uint64_t start, const void *source, uint64_t length);

/*
 * Find a pattern in [start, end): its address, or -ENOENT. Unreadable memory is skipped.
 */
int uffd_remote_find(int32_t pid, uint64_t start, uint64_t end, const void *pattern,
		     uint64_t pattern_length, uint64_t *address_ret);

/*
 * Whether two processes share their memory, as after vfork(2): 1, 0, or -errno of kcmp(2)
 * (-EPERM: we may not trace one of them; -ESRCH: one is gone).
 */
int uffd_remote_same_memory(int32_t pid, int32_t other_pid);

#endif /* UFFD_REMOTE_MEMORY_H */
