/* SPDX-License-Identifier: MIT */
/* Fill scattered pages from files, each read into memory of ours first. */
#ifndef UFFD_ENGINE_FROM_FILES_H
#define UFFD_ENGINE_FROM_FILES_H

#include "core.h"
#include "overlay.h"
#include "uffd_pagemap.h"

/*
 * The content of a range as runs of files, the last one up to `length`.  Leaf 0 is zeros, the file of leaf n + 1 is `fds[n]`.
 */
struct uffd_content_files {
	const struct uffd_run_spec *runs;
	uint64_t count;
	uint64_t length;
	const int32_t *fds;
	uint64_t fds_count;
};

/*
 * Fill the absent pages of rows (begin, end, not used), offsets in the range, in this order.
 * For few pages here and there this is half the work of uffd_engine_populate_ranges(): no
 * mapping of the file has to be faulted in, and a read tells by itself if the file is cut.
 *
 * It is for pages that others would fill later: one that cannot be read, or not now, is left
 * to them.  -EINVAL: a row is no range of whole pages, and nothing is filled.
 */
int uffd_engine_fill_from_files(struct uffd_engine *engine, const struct uffd_range_ref *ref,
				const struct uffd_page_region *rows, uint64_t count,
				const struct uffd_content_files *files, uint64_t *filled_ret);

#endif /* UFFD_ENGINE_FROM_FILES_H */
