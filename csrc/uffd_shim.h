/* SPDX-License-Identifier: MIT */
/*
 * The thin layer: one function per system call and ioctl.
 *
 * Everything returns 0 (or a count) or -errno.  EINTR is retried if the call can be
 * repeated without harm; every other errno is returned unchanged.  Results come last and
 * are written on failure too: the kernel's result field, 0 if the kernel did not set it.
 * No policy, no defaults, no printing, no globals.
 */
#ifndef UFFD_SHIM_H
#define UFFD_SHIM_H

#include <stdint.h>

#include "uffd_abi.h"

/* Opening (a descriptor or -errno) and the handshake. */
int uffd_shim_open_syscall(int flags);
int uffd_shim_open_device(const char *path, int flags);
int uffd_shim_api(int fd, uint64_t features, uint64_t *features_ret, uint64_t *ioctls_ret);

/* The ioctls of ioctl_userfaultfd(2). */
int uffd_shim_register(int fd, uint64_t start, uint64_t length, uint64_t mode,
		       uint64_t *ioctls_ret);
/*
 * Register memory and unregister it again: by one call, since a thread that touches it in
 * between may hold the GIL.
 */
int uffd_shim_try_register(int fd, uint64_t start, uint64_t length, uint64_t mode);
int uffd_shim_unregister(int fd, uint64_t start, uint64_t length);
int uffd_shim_wake(int fd, uint64_t start, uint64_t length);
int uffd_shim_copy(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
		   int64_t *copy_ret);
int uffd_shim_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode,
		       int64_t *zeropage_ret);
int uffd_shim_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
		   int64_t *move_ret);
int uffd_shim_writeprotect(int fd, uint64_t start, uint64_t length, uint64_t mode);
int uffd_shim_continue(int fd, uint64_t start, uint64_t length, uint64_t mode,
		       int64_t *mapped_ret);
int uffd_shim_poison(int fd, uint64_t start, uint64_t length, uint64_t mode,
		     int64_t *updated_ret);
int uffd_shim_rwprotect(int fd, uint64_t start, uint64_t length, uint64_t mode);
int uffd_shim_set_mode(int fd, uint64_t enable, uint64_t disable);

/* read(2): bytes read (whole messages only) or -errno. */
int64_t uffd_shim_read(int fd, void *buffer, uint64_t size);

/* The ioctl numbers as built, indexed by the bit number _UFFDIO_*; 0 if unknown. */
uint64_t uffd_shim_ioctl_number(uint32_t nr);

/* Memory. */
int uffd_shim_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd,
		   uint64_t offset, uint64_t *address_ret);
int uffd_shim_munmap(uint64_t start, uint64_t length);
int uffd_shim_mremap(uint64_t from, uint64_t length, uint64_t new_length, int flags,
		     uint64_t to, uint64_t *address_ret);
int uffd_shim_mprotect(uint64_t start, uint64_t length, int prot);
int uffd_shim_madvise(uint64_t start, uint64_t length, int advice);
int uffd_shim_memfd_create(const char *name, uint32_t flags);
int uffd_shim_fallocate(int fd, int mode, int64_t offset, int64_t length);
int uffd_shim_fstatfs(int fd, int64_t *type_ret, uint64_t *block_size_ret);

#endif /* UFFD_SHIM_H */
