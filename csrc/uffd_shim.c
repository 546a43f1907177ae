// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "uffd_shim.h"

static int retry_ioctl(int fd, unsigned long request, void *argument)
{
	int r;

	do
		r = ioctl(fd, request, argument);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int uffd_shim_open_syscall(int flags)
{
	long fd = syscall(__NR_userfaultfd, flags);

	return fd < 0 ? -errno : (int)fd;
}

int uffd_shim_open_device(const char *path, int flags)
{
	int device = open(path, O_RDWR | O_CLOEXEC);
	int fd;

	if (device < 0)
		return -errno;
	fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
	if (fd < 0)
		fd = -errno;
	close(device);
	return fd;
}

int uffd_shim_api(int fd, uint64_t features, uint64_t *features_ret, uint64_t *ioctls_ret)
{
	struct uffdio_api arg = { .api = UFFD_API, .features = features };
	int r = retry_ioctl(fd, UFFDIO_API, &arg);

	/* The kernel zeroes the whole struct on failure. */
	*features_ret = r ? 0 : arg.features;
	*ioctls_ret = r ? 0 : arg.ioctls;
	return r;
}

int uffd_shim_register(int fd, uint64_t start, uint64_t length, uint64_t mode,
		       uint64_t *ioctls_ret)
{
	struct uffdio_register arg = { .range = { start, length }, .mode = mode };
	int r = retry_ioctl(fd, UFFDIO_REGISTER, &arg);

	*ioctls_ret = r ? 0 : arg.ioctls;
	return r;
}

int uffd_shim_unregister(int fd, uint64_t start, uint64_t length)
{
	struct uffdio_range arg = { start, length };

	return retry_ioctl(fd, UFFDIO_UNREGISTER, &arg);
}

int uffd_shim_wake(int fd, uint64_t start, uint64_t length)
{
	struct uffdio_range arg = { start, length };

	return retry_ioctl(fd, UFFDIO_WAKE, &arg);
}

int uffd_shim_try_register(int fd, uint64_t start, uint64_t length, uint64_t mode)
{
	uint64_t ignored;
	int r = uffd_shim_register(fd, start, length, mode, &ignored);

	if (r)
		return r;
	r = uffd_shim_unregister(fd, start, length);
	/* Linux wakes only those that wait for a missing page. */
	uffd_shim_wake(fd, start, length);
	return r;
}

int uffd_shim_copy(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
		   int64_t *copy_ret)
{
	struct uffdio_copy arg = { .dst = dst, .src = src, .len = length, .mode = mode };
	int r = retry_ioctl(fd, UFFDIO_COPY, &arg);

	*copy_ret = arg.copy;
	return r;
}

int uffd_shim_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode,
		       int64_t *zeropage_ret)
{
	struct uffdio_zeropage arg = { .range = { start, length }, .mode = mode };
	int r = retry_ioctl(fd, UFFDIO_ZEROPAGE, &arg);

	*zeropage_ret = arg.zeropage;
	return r;
}

int uffd_shim_move(int fd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode,
		   int64_t *move_ret)
{
	struct uffdio_move arg = { .dst = dst, .src = src, .len = length, .mode = mode };
	int r = retry_ioctl(fd, UFFDIO_MOVE, &arg);

	*move_ret = arg.move;
	return r;
}

int uffd_shim_writeprotect(int fd, uint64_t start, uint64_t length, uint64_t mode)
{
	struct uffdio_writeprotect arg = { .range = { start, length }, .mode = mode };

	return retry_ioctl(fd, UFFDIO_WRITEPROTECT, &arg);
}

int uffd_shim_continue(int fd, uint64_t start, uint64_t length, uint64_t mode,
		       int64_t *mapped_ret)
{
	struct uffdio_continue arg = { .range = { start, length }, .mode = mode };
	int r = retry_ioctl(fd, UFFDIO_CONTINUE, &arg);

	*mapped_ret = arg.mapped;
	return r;
}

int uffd_shim_poison(int fd, uint64_t start, uint64_t length, uint64_t mode,
		     int64_t *updated_ret)
{
	struct uffdio_poison arg = { .range = { start, length }, .mode = mode };
	int r = retry_ioctl(fd, UFFDIO_POISON, &arg);

	*updated_ret = arg.updated;
	return r;
}

int uffd_shim_rwprotect(int fd, uint64_t start, uint64_t length, uint64_t mode)
{
	struct uffdio_rwprotect arg = { .range = { start, length }, .mode = mode };

	return retry_ioctl(fd, UFFDIO_RWPROTECT, &arg);
}

int uffd_shim_set_mode(int fd, uint64_t enable, uint64_t disable)
{
	struct uffdio_set_mode arg = { enable, disable };

	return retry_ioctl(fd, UFFDIO_SET_MODE, &arg);
}

int64_t uffd_shim_read(int fd, void *buffer, uint64_t size)
{
	ssize_t n;

	do
		n = read(fd, buffer, size);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

uint64_t uffd_shim_ioctl_number(uint32_t nr)
{
	switch (nr) {
	case _UFFDIO_REGISTER:		return UFFDIO_REGISTER;
	case _UFFDIO_UNREGISTER:	return UFFDIO_UNREGISTER;
	case _UFFDIO_WAKE:		return UFFDIO_WAKE;
	case _UFFDIO_COPY:		return UFFDIO_COPY;
	case _UFFDIO_ZEROPAGE:		return UFFDIO_ZEROPAGE;
	case _UFFDIO_MOVE:		return UFFDIO_MOVE;
	case _UFFDIO_WRITEPROTECT:	return UFFDIO_WRITEPROTECT;
	case _UFFDIO_CONTINUE:		return UFFDIO_CONTINUE;
	case _UFFDIO_POISON:		return UFFDIO_POISON;
	case _UFFDIO_RWPROTECT:		return UFFDIO_RWPROTECT;
	case _UFFDIO_SET_MODE:		return UFFDIO_SET_MODE;
	case _UFFDIO_API:		return UFFDIO_API;
	default:			return 0;
	}
}

int uffd_shim_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd,
		   uint64_t offset, uint64_t *address_ret)
{
	void *p = mmap((void *)(uintptr_t)address, length, prot, flags, fd, (off_t)offset);

	*address_ret = p == MAP_FAILED ? 0 : (uint64_t)(uintptr_t)p;
	return p == MAP_FAILED ? -errno : 0;
}

int uffd_shim_munmap(uint64_t start, uint64_t length)
{
	return munmap((void *)(uintptr_t)start, length) ? -errno : 0;
}

int uffd_shim_mremap(uint64_t from, uint64_t length, uint64_t new_length, int flags,
		     uint64_t to, uint64_t *address_ret)
{
	void *p = mremap((void *)(uintptr_t)from, length, new_length, flags,
			 (void *)(uintptr_t)to);

	*address_ret = p == MAP_FAILED ? 0 : (uint64_t)(uintptr_t)p;
	return p == MAP_FAILED ? -errno : 0;
}

int uffd_shim_mprotect(uint64_t start, uint64_t length, int prot)
{
	return mprotect((void *)(uintptr_t)start, length, prot) ? -errno : 0;
}

int uffd_shim_madvise(uint64_t start, uint64_t length, int advice)
{
	return madvise((void *)(uintptr_t)start, length, advice) ? -errno : 0;
}

int uffd_shim_memfd_create(const char *name, uint32_t flags)
{
	int fd = memfd_create(name, flags);

	return fd < 0 ? -errno : fd;
}

int uffd_shim_fallocate(int fd, int mode, int64_t offset, int64_t length)
{
	int r;

	do
		r = fallocate(fd, mode, offset, length);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int uffd_shim_fstatfs(int fd, int64_t *type_ret, uint64_t *block_size_ret)
{
	struct statfs fs = { 0 };
	int r;

	do
		r = fstatfs(fd, &fs);
	while (r < 0 && errno == EINTR);
	*type_ret = fs.f_type;
	*block_size_ret = (uint64_t)fs.f_bsize;
	return r < 0 ? -errno : 0;
}
