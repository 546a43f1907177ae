/* SPDX-License-Identifier: MIT */
/* A file, or a part of one, as the content of pages. */
#ifndef UFFD_ENGINE_FILE_H
#define UFFD_ENGINE_FILE_H

#include <stdbool.h>
#include <stdint.h>

struct shared_fd;

struct uffd_file {
	int fd;			/* for the file's size; -1: none */
	struct shared_fd *shared;	/* whose it is; NULL: our own */
	bool sealed;		/* the file cannot shrink */
	bool tells_cached;	/* mincore(2) tells what the page cache has of it */
	uint64_t offset;	/* where in the file the part begins */
	uint64_t address;	/* where that is mapped */
	void *mapping;		/* `mapped` bytes; 0: none */
	uint64_t mapped;
	uint64_t around;	/* see uffd_file_read_around() */
};

/*
 * Open `length` bytes from `offset` on, and map them, so that UFFDIO_COPY reads the page
 * cache itself.  If the file ends early the ioctl fails with EFAULT; nothing else touches
 * the mapping.  `can_read`: uffd_file_read() will be called.  `around`: see
 * uffd_file_read_around().
 */
int uffd_file_open(struct uffd_file *file, int fd, uint64_t offset, uint64_t length,
		   bool can_read, uint64_t around);
void uffd_file_close(struct uffd_file *file);
/* In the child of a fork: another thread may have been opening a file. */
void uffd_file_forget_parent(void);

/* How many of the bytes [at, at + length) of the part the file still has. */
uint64_t uffd_file_covered(const struct uffd_file *file, uint64_t at, uint64_t length);

/*
 * Before a thread that waits gets [at, at + length): if that is not in the page cache, have
 * the kernel read `around` bytes there, at least.  With 0 the kernel decides: it reads as
 * much as the device's readahead is, which may be megabytes.  Async-signal-safe.
 */
void uffd_file_read_around(const struct uffd_file *file, uint64_t at, uint64_t length);

/*
 * Whether [at, at + length) of the part is in the page cache, so that nobody waits for it; false
 * if the kernel does not tell.
 */
bool uffd_file_is_cached(const struct uffd_file *file, uint64_t at, uint64_t length);

/* Whether a descriptor is of the same file. */
bool uffd_file_is(const struct uffd_file *file, int fd);
/* Open the file of a descriptor for reading; returns a descriptor. */
int uffd_file_reopen(int fd);

/* Read without a fault on a truncated file: -ENODATA. */
int uffd_file_read(const struct uffd_file *file, void *target, uint64_t at, uint64_t length);
/* The same from a descriptor that was not opened here. */
int uffd_file_read_from(int fd, void *target, uint64_t length, uint64_t offset);

#endif /* UFFD_ENGINE_FILE_H */
