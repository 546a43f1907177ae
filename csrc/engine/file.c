// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "alloc.h"
#include "base/page.h"
#include "file.h"

/* linux/fs.h, linux/magic.h */
#define BLKGETSIZE64 _IOR(0x12, 114, size_t)
#define HUGETLBFS_MAGIC 0x958458f6

int uffd_file_read_from(int fd, void *target, uint64_t length, uint64_t offset)
{
	uint64_t done = 0;

	while (done < length) {
		ssize_t n = pread(fd, (char *)target + done, length - done, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		done += (uint64_t)n;
	}
	return 0;
}

static bool is_sealed(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);

	return seals >= 0 && (seals & F_SEAL_SHRINK);
}

/* The unit of the offset and the size of this file's mappings. */
static uint64_t mapping_unit(int fd)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) == 0 && (uint32_t)fs.f_type == HUGETLBFS_MAGIC)
		return (uint64_t)fs.f_bsize;
	return BASE_PAGE;
}

/* mincore(2) calls all of a file cached for who neither owns nor may write it. */
static bool tells_cached(int fd)
{
	struct stat st;

	return fstat(fd, &st) == 0 &&
	       (st.st_uid == geteuid() ||
		faccessat(fd, "", W_OK, AT_EACCESS | AT_EMPTY_PATH) == 0);
}

/*
 * Open the file with O_PATH.  Closing an ordinary descriptor of a network file asks its
 * server, which may never answer; closing this one does not, and it tells the size.
 */
static int name_file(int fd)
{
	char path[32];
	struct stat st;

	if (fstat(fd, &st) || !S_ISREG(st.st_mode))
		return -1;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, O_PATH | O_CLOEXEC);
}

/* One call reads no more than the device's readahead or its largest request, seldom less than this. */
#define READ_AT_ONCE	UINT64_C(0x20000)

/*
 * Ranges of one file share such a descriptor: a restore of thousands of regions has to do with
 * few files.
 */
struct shared_fd {
	dev_t device;
	ino_t inode;
	int fd;
	uint32_t users;
	struct shared_fd *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct shared_fd *all_shared;

void uffd_file_forget_parent(void)
{
	pthread_mutex_init(&lock, NULL);
	all_shared = NULL;
}

static struct shared_fd *new_shared(const struct stat *st, int fd)
{
	struct shared_fd *shared = uffd_alloc(sizeof(*shared));

	if (shared)
		*shared = (struct shared_fd){ st->st_dev, st->st_ino, name_file(fd), 0, NULL };
	if (!shared || shared->fd >= 0)
		return shared;
	uffd_free(shared);
	return NULL;
}

/* Count a user of what is shared already, or of `fresh`; the lock is not held. */
static struct shared_fd *use_shared(const struct stat *st, struct shared_fd *fresh)
{
	struct shared_fd *found;

	pthread_mutex_lock(&lock);
	found = all_shared;
	while (found && (found->inode != st->st_ino || found->device != st->st_dev))
		found = found->next;
	if (!found && fresh) {
		fresh->next = all_shared;
		found = all_shared = fresh;
	}
	if (found)
		found->users++;
	pthread_mutex_unlock(&lock);
	return found;
}

static void free_shared(struct shared_fd *shared)
{
	close(shared->fd);
	uffd_free(shared);
}

static struct shared_fd *share_fd(int fd)
{
	struct shared_fd *found, *fresh;
	struct stat st;

	if (fstat(fd, &st))
		return NULL;
	found = use_shared(&st, NULL);
	if (found)
		return found;
	/* Outside the lock: a file system may be slow. */
	fresh = new_shared(&st, fd);
	if (!fresh)
		return NULL;
	found = use_shared(&st, fresh);
	if (found != fresh)
		free_shared(fresh);
	return found;
}

static void unshare_fd(struct shared_fd *shared)
{
	struct shared_fd **link;

	pthread_mutex_lock(&lock);
	if (--shared->users) {
		pthread_mutex_unlock(&lock);
		return;
	}
	for (link = &all_shared; *link && *link != shared; link = &(*link)->next)
		;
	if (*link)
		*link = shared->next;
	pthread_mutex_unlock(&lock);
	free_shared(shared);
}

int uffd_file_open(struct uffd_file *file, int fd, uint64_t offset, uint64_t length,
		   bool can_read, uint64_t around)
{
	uint64_t unit = mapping_unit(fd);
	uint64_t lead = offset % unit;
	void *mapping;

	*file = (struct uffd_file){ .fd = -1, .offset = offset };
	if (!can_read)
		file->shared = share_fd(fd);
	if (file->shared)
		file->fd = file->shared->fd;
	else
		file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (file->fd < 0)
		return -errno;
	file->sealed = is_sealed(fd);
	file->tells_cached = tells_cached(fd);
	if (!length)
		return 0;
	file->mapped = (length + lead + unit - 1) & ~(unit - 1);
	mapping = mmap(NULL, file->mapped, PROT_READ, MAP_SHARED, fd, (off_t)(offset - lead));
	if (mapping == MAP_FAILED) {
		file->mapped = 0;
		return -errno;
	}
	file->mapping = mapping;
	file->address = (uint64_t)(uintptr_t)mapping + lead;
	file->around = around;
	if (around)
		madvise(mapping, file->mapped, MADV_RANDOM);
	return 0;
}

bool uffd_file_is(const struct uffd_file *file, int fd)
{
	struct stat ours, other;

	return fstat(file->fd, &ours) == 0 && fstat(fd, &other) == 0 &&
	       ours.st_dev == other.st_dev && ours.st_ino == other.st_ino;
}

int uffd_file_reopen(int fd)
{
	char path[32];
	int copy;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	copy = open(path, O_RDONLY | O_CLOEXEC);
	return copy < 0 ? -errno : copy;
}

void uffd_file_close(struct uffd_file *file)
{
	if (file->mapped)
		munmap(file->mapping, file->mapped);
	if (file->shared)
		unshare_fd(file->shared);
	else if (file->fd >= 0)
		close(file->fd);
	*file = (struct uffd_file){ .fd = -1 };
}

/* The file's size now, in bytes; 0 if it is unknown. */
static uint64_t file_size(int fd)
{
	struct stat st;
	uint64_t size;

	if (fstat(fd, &st))
		return 0;
	if (!S_ISBLK(st.st_mode))
		return (uint64_t)st.st_size;
	return ioctl(fd, BLKGETSIZE64, &size) ? 0 : size;
}

uint64_t uffd_file_covered(const struct uffd_file *file, uint64_t at, uint64_t length)
{
	uint64_t from = file->offset + at;
	uint64_t size;

	if (file->sealed)
		return length;
	size = file_size(file->fd);
	if (size >= from + length)
		return length;
	return size <= from ? 0 : size - from;
}

void uffd_file_read_around(const struct uffd_file *file, uint64_t at, uint64_t length)
{
	uint64_t first = (uint64_t)(uintptr_t)file->mapping, past = first + file->mapped;
	uint64_t from = (file->address + at) & ~(uint64_t)(BASE_PAGE - 1);
	uint64_t to = (file->address + at + length + BASE_PAGE - 1) & ~(uint64_t)(BASE_PAGE - 1);
	unsigned char is_cached = 0;
	int saved_errno = errno;

	/* A fault of one page reads as much by itself. */
	if (!file->mapped || higher(file->around, to - from) <= BASE_PAGE)
		return;
	if (to - from == BASE_PAGE && mincore((void *)(uintptr_t)from, BASE_PAGE, &is_cached) == 0 &&
	    is_cached & 1)
		return;
	from = higher(from & ~(file->around - 1), first);
	to = lower(higher(to, from + file->around), past);
	for (; from < to; from += READ_AT_ONCE)
		madvise((void *)(uintptr_t)from, lower(to - from, READ_AT_ONCE), MADV_WILLNEED);
	errno = saved_errno;
}

/* Pages that one call asks for. */
#define ASKED_AT_ONCE	512u

bool uffd_file_is_cached(const struct uffd_file *file, uint64_t at, uint64_t length)
{
	uint64_t from = (file->address + at) & ~(uint64_t)(BASE_PAGE - 1);
	uint64_t to = file->address + at + length;
	unsigned char cached[ASKED_AT_ONCE];
	int saved_errno = errno;
	bool ret = file->tells_cached && file->mapped;

	for (uint64_t size; ret && from < to; from += size) {
		uint64_t pages;

		size = lower(to - from, ASKED_AT_ONCE * (uint64_t)BASE_PAGE);
		pages = (size + BASE_PAGE - 1) / BASE_PAGE;
		ret = mincore((void *)(uintptr_t)from, size, cached) == 0;
		for (uint64_t i = 0; ret && i < pages; i++)
			ret = cached[i] & 1;
	}
	errno = saved_errno;
	return ret;
}

int uffd_file_read(const struct uffd_file *file, void *target, uint64_t at, uint64_t length)
{
	return uffd_file_read_from(file->fd, target, length, file->offset + at);
}
