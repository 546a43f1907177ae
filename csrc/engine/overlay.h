/* SPDX-License-Identifier: MIT */
/*
 * Content made of several sources: each byte of a range comes from one leaf, which is
 * zeros, memory of this process, a file, or what a worker is asked for.  Once made, an
 * overlay does not change.
 */
#ifndef UFFD_ENGINE_OVERLAY_H
#define UFFD_ENGINE_OVERLAY_H

#include <stdbool.h>
#include <stdint.h>

#include "file.h"

enum uffd_leaf_kind {
	UFFD_LEAF_ZERO,
	UFFD_LEAF_MEMORY,
	UFFD_LEAF_FILE,
	UFFD_LEAF_REQUEST,	/* a page with any byte of it is requested from a worker */
};

struct uffd_leaf_spec {
	uint32_t kind;		/* enum uffd_leaf_kind */
	int32_t fd;		/* FILE: duplicated */
	uint64_t address;	/* MEMORY: borrowed as long as the overlay lives */
	uint64_t offset;	/* FILE: of the leaf's first byte */
	uint64_t around;	/* FILE: a power of two, or 0; see uffd_file_read_around() */
};

/* Bytes of the range from `start` up to the next run's start. */
struct uffd_run_spec {
	uint64_t start;
	uint64_t leaf;		/* its number */
	uint64_t offset;	/* of `start` in the leaf */
};

/* The number of the run that has the byte at `offset`. */
uint64_t uffd_run_at(const struct uffd_run_spec *runs, uint64_t count, uint64_t offset);

struct uffd_overlay_spec {
	const struct uffd_leaf_spec *leaves;
	uint64_t leaf_count;
	const struct uffd_run_spec *runs;	/* by start; the first begins at 0 */
	uint64_t run_count;
	uint32_t is_outline;	/* only tells where zeros are: no leaf is opened or read */
};

struct uffd_overlay;

/*
 * Copies all of `spec`.  `length` and `page_size` are the range's, in bytes.  `is_read`:
 * uffd_overlay_read() will be called for more than pages of several runs.  -EPERM, -ENOSYS:
 * reading is necessary, and this process may not call process_vm_readv(2).
 */
int uffd_overlay_create(const struct uffd_overlay_spec *spec, uint64_t length,
			uint64_t page_size, bool is_read, struct uffd_overlay **ret);
void uffd_overlay_destroy(struct uffd_overlay *overlay);

enum uffd_stretch_kind {
	UFFD_STRETCH_ZERO,
	UFFD_STRETCH_BYTES,	/* of one leaf, at an address */
	UFFD_STRETCH_MIXED,	/* one page, of several runs */
	UFFD_STRETCH_REQUEST,	/* whole pages, or one of several runs, one of them REQUEST */
};

/* The origin of the pages from an offset on. */
struct uffd_stretch {
	enum uffd_stretch_kind kind;
	uint64_t length;	/* whole pages */
	uint64_t address;	/* BYTES */
	const struct uffd_file *file;	/* BYTES of a file; else NULL */
	uint64_t file_at;	/* in the file's part */
};

/* The first stretch of [offset, offset + length), which are whole pages. */
struct uffd_stretch uffd_overlay_stretch(const struct uffd_overlay *overlay, uint64_t offset,
					 uint64_t length);

/* Before a thread that waits gets them: uffd_file_read_around() for what is of files. */
void uffd_overlay_read_around(const struct uffd_overlay *overlay, uint64_t offset,
			      uint64_t length);

/*
 * Copy any bytes to memory of this process.  -EFAULT, -ENODATA: a leaf's memory is not
 * mapped, a file was truncated; there is no signal.  Async-signal-safe.
 */
int uffd_overlay_read(const struct uffd_overlay *overlay, void *target, uint64_t offset,
		      uint64_t length);

/* Fault in the memory that [offset, offset + length) is read from, as far as possible. */
void uffd_overlay_fault_in(const struct uffd_overlay *overlay, uint64_t offset, uint64_t length);

/* Room for one page, NULL if there is none; async-signal-safe. */
void *uffd_overlay_borrow(struct uffd_overlay *overlay);
void uffd_overlay_give_back(struct uffd_overlay *overlay, void *page);

#endif /* UFFD_ENGINE_OVERLAY_H */
