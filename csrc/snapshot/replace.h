/* SPDX-License-Identifier: MIT */
/* Map files in the place of memory of this process that nobody has touched. */
#ifndef UFFD_SNAPSHOT_REPLACE_H
#define UFFD_SNAPSHOT_REPLACE_H

#include <stdint.h>

/* A part of a file, and where it is mapped: private, readable and writable. */
struct uffd_replacement {
	uint64_t start;
	uint64_t length;
	uint64_t offset;
	uint64_t fd;
};

enum uffd_replace_step {
	UFFD_REPLACE_REGISTER,
	UFFD_REPLACE_LOOK,
	UFFD_REPLACE_MAP,
};

/*
 * Register @count spans (start, length) of private anonymous memory of small pages, look for
 * pages, and map files over them.  A thread that touches the memory meanwhile waits for the end,
 * and then has the files.  It may hold the GIL, so all of it is one call.
 *
 * -EEXIST: there are pages.  After an error nothing is replaced; if mmap(2) failed, parts of the
 * memory are empty again.
 *
 * @uffd: a userfaultfd without features that has nothing registered; -1: nobody waits, and what is
 *	written during the call may be lost.
 * @pagemap_fd: -1: nobody looks.
 * @vec: in the order of the spans, and in each of them ascending.
 * @at_ret: where an error is.
 */
int uffd_replace_untouched(int uffd, int pagemap_fd, const uint64_t *spans, uint64_t count,
			   const struct uffd_replacement *vec, uint64_t vec_count,
			   uint32_t *step_ret, uint64_t *at_ret);

#endif /* UFFD_SNAPSHOT_REPLACE_H */
