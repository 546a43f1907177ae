// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "alloc.h"
#include "base/page.h"
#include "fill.h"
#include "overlay.h"

/* Pages kept for reuse; more threads at once map and unmap theirs. */
#define ROOMS		4
/* Larger pages are not kept: they would cost as much memory as the page itself. */
#define LARGEST_KEPT	(2u << 20)
/* Runs that one system call copies. */
#define BATCH		32

struct leaf {
	uint32_t kind;		/* enum uffd_leaf_kind */
	uint64_t address;	/* of its first byte; wraps around if only a later part is mapped */
	struct uffd_file file;	/* of the part that runs use */
	uint64_t file_from, file_to;	/* where in the leaf that part lies */
};

struct uffd_overlay {
	uint64_t length;
	uint64_t page_size;
	uint64_t run_count;
	uint64_t leaf_count;
	struct uffd_run_spec *runs;
	struct leaf *leaves;
	_Atomic(void *) rooms[ROOMS];
};

static uint64_t run_end(const struct uffd_overlay *overlay, uint64_t run)
{
	return run + 1 < overlay->run_count ? overlay->runs[run + 1].start : overlay->length;
}

uint64_t uffd_run_at(const struct uffd_run_spec *runs, uint64_t count, uint64_t offset)
{
	uint64_t low = 0, high = count;

	while (high - low > 1) {
		uint64_t middle = low + (high - low) / 2;

		if (runs[middle].start <= offset)
			low = middle;
		else
			high = middle;
	}
	return low;
}

static uint64_t run_at(const struct uffd_overlay *overlay, uint64_t offset)
{
	return uffd_run_at(overlay->runs, overlay->run_count, offset);
}

/* One run, cut to [offset, end). */
struct part {
	const struct leaf *leaf;
	uint64_t at;		/* in the leaf */
	uint64_t length;
};

static struct part part_at(const struct uffd_overlay *overlay, uint64_t run, uint64_t offset,
			   uint64_t end)
{
	const struct uffd_run_spec *spec = &overlay->runs[run];

	return (struct part){
		.leaf = &overlay->leaves[spec->leaf],
		.at = spec->offset + (offset - spec->start),
		.length = lower(run_end(overlay, run), end) - offset,
	};
}

/* Making one */

static bool is_valid(const struct uffd_overlay_spec *spec, uint64_t length)
{
	uint64_t i;

	if (!spec->run_count || spec->runs[0].start)
		return false;
	for (i = 0; i < spec->run_count; i++) {
		if (spec->runs[i].leaf >= spec->leaf_count || spec->runs[i].start >= length)
			return false;
		if (i && spec->runs[i].start <= spec->runs[i - 1].start)
			return false;
	}
	return true;
}

/* Whether a page has bytes of several runs, which must be copied together first. */
static bool has_mixed(const struct uffd_overlay *overlay)
{
	for (uint64_t i = 0; i < overlay->run_count; i++) {
		uint64_t start = overlay->runs[i].start, page = start & ~(overlay->page_size - 1);

		if (start > page &&
		    uffd_overlay_stretch(overlay, page, overlay->page_size).kind ==
			    UFFD_STRETCH_MIXED)
			return true;
	}
	return false;
}

/* A seccomp filter may refuse process_vm_readv(2): find out before a page needs it. */
static int check_copying(void)
{
	char from = 0, to;
	struct iovec source = { &from, 1 }, target = { &to, 1 };

	return process_vm_readv(getpid(), &target, 1, &source, 1, 0) < 0 ? -errno : 0;
}

/* Find out which part of each leaf the runs use. */
static void measure_leaves(struct uffd_overlay *overlay)
{
	for (uint64_t i = 0; i < overlay->run_count; i++) {
		const struct uffd_run_spec *run = &overlay->runs[i];
		struct leaf *leaf = &overlay->leaves[run->leaf];
		uint64_t past = run->offset + run_end(overlay, i) - run->start;

		leaf->file_from = leaf->file_to ? lower(leaf->file_from, run->offset) : run->offset;
		leaf->file_to = higher(leaf->file_to, past);
	}
}

static int open_leaves(struct uffd_overlay *overlay, const struct uffd_overlay_spec *spec)
{
	int r = 0;

	for (uint64_t i = 0; i < spec->leaf_count; i++)
		overlay->leaves[i] = (struct leaf){
			.kind = spec->leaves[i].kind,
			.address = spec->leaves[i].address,
			.file.fd = -1,
		};
	overlay->leaf_count = spec->leaf_count;
	measure_leaves(overlay);
	for (uint64_t i = 0; i < spec->leaf_count && r == 0 && !spec->is_outline; i++) {
		struct leaf *leaf = &overlay->leaves[i];

		if (leaf->kind != UFFD_LEAF_FILE || !leaf->file_to)
			continue;
		r = uffd_file_open(&leaf->file, spec->leaves[i].fd,
				   spec->leaves[i].offset + leaf->file_from,
				   leaf->file_to - leaf->file_from, false,
				   spec->leaves[i].around);
		leaf->address = leaf->file.address - leaf->file_from;
	}
	return r;
}

int uffd_overlay_create(const struct uffd_overlay_spec *spec, uint64_t length,
			uint64_t page_size, bool is_read, struct uffd_overlay **ret)
{
	struct uffd_overlay *overlay;
	int r = -ENOMEM;

	*ret = NULL;
	if (!is_valid(spec, length))
		return -EINVAL;
	overlay = uffd_alloc(sizeof(*overlay));
	if (!overlay)
		return -ENOMEM;
	overlay->length = length;
	overlay->page_size = page_size;
	overlay->run_count = spec->run_count;
	overlay->runs = uffd_alloc(spec->run_count * sizeof(*overlay->runs));
	overlay->leaves = uffd_alloc(spec->leaf_count * sizeof(*overlay->leaves));
	if (overlay->runs && overlay->leaves) {
		memcpy(overlay->runs, spec->runs, spec->run_count * sizeof(*overlay->runs));
		r = open_leaves(overlay, spec);
	}
	if (r == 0 && !spec->is_outline && (is_read || has_mixed(overlay)))
		r = check_copying();
	if (r) {
		uffd_overlay_destroy(overlay);
		return r;
	}
	*ret = overlay;
	return 0;
}

void uffd_overlay_destroy(struct uffd_overlay *overlay)
{
	if (!overlay)
		return;
	for (size_t i = 0; i < ROOMS; i++) {
		void *room = atomic_load(&overlay->rooms[i]);

		if (room)
			munmap(room, overlay->page_size);
	}
	for (uint64_t i = 0; i < overlay->leaf_count; i++)
		uffd_file_close(&overlay->leaves[i].file);
	uffd_free(overlay->runs);
	uffd_free(overlay->leaves);
	uffd_free(overlay);
}

/* Reading it */

static bool has_request(const struct uffd_overlay *overlay, uint64_t offset, uint64_t end)
{
	for (uint64_t run = run_at(overlay, offset); offset < end; run++) {
		struct part part = part_at(overlay, run, offset, end);

		if (part.leaf->kind == UFFD_LEAF_REQUEST)
			return true;
		offset += part.length;
	}
	return false;
}

struct uffd_stretch uffd_overlay_stretch(const struct uffd_overlay *overlay, uint64_t offset,
					 uint64_t length)
{
	struct part part = part_at(overlay, run_at(overlay, offset), offset, offset + length);
	struct uffd_stretch stretch = {
		.kind = part.leaf->kind == UFFD_LEAF_ZERO ? UFFD_STRETCH_ZERO
							  : UFFD_STRETCH_BYTES,
		.length = part.length & ~(overlay->page_size - 1),
		.address = part.leaf->address + part.at,
	};

	if (!stretch.length) {
		stretch.length = overlay->page_size;
		stretch.kind = has_request(overlay, offset, offset + stretch.length)
				       ? UFFD_STRETCH_REQUEST
				       : UFFD_STRETCH_MIXED;
	} else if (part.leaf->kind == UFFD_LEAF_REQUEST) {
		stretch.kind = UFFD_STRETCH_REQUEST;
	} else if (part.leaf->kind == UFFD_LEAF_FILE) {
		stretch.file = &part.leaf->file;
		stretch.file_at = part.at - part.leaf->file_from;
	}
	return stretch;
}

void uffd_overlay_read_around(const struct uffd_overlay *overlay, uint64_t offset,
			      uint64_t length)
{
	uint64_t end = offset + length;

	for (uint64_t run = run_at(overlay, offset); offset < end; run++) {
		struct part part = part_at(overlay, run, offset, end);

		if (part.leaf->kind == UFFD_LEAF_FILE && part.leaf->file.around)
			uffd_file_read_around(&part.leaf->file, part.at - part.leaf->file_from,
					      part.length);
		offset += part.length;
	}
}

/* -ENODATA if a file has lost some of it: the rest of its last page would read as zeros. */
static int check_covered(const struct uffd_overlay *overlay, uint64_t offset, uint64_t end)
{
	for (uint64_t run = run_at(overlay, offset); offset < end; run++) {
		struct part part = part_at(overlay, run, offset, end);

		if (part.leaf->kind == UFFD_LEAF_FILE &&
		    uffd_file_covered(&part.leaf->file, part.at - part.leaf->file_from,
				      part.length) < part.length)
			return -ENODATA;
		offset += part.length;
	}
	return 0;
}

/* Pieces of memory to be copied one behind the other. */
struct batch {
	char *target;
	uint64_t length;
	uint64_t count;
	struct iovec pieces[BATCH];
};

/* By a system call, so that memory that cannot be read is an error and no signal. */
static int copy_batch(struct batch *batch)
{
	struct iovec target = { batch->target, batch->length };
	int64_t copied = 0;

	if (batch->count)
		copied = process_vm_readv(getpid(), &target, 1, batch->pieces, batch->count, 0);
	if (copied < 0)
		return -errno;
	if ((uint64_t)copied != batch->length)
		return -EFAULT;
	batch->target += batch->length;
	batch->length = batch->count = 0;
	return 0;
}

static int copy_part(struct batch *batch, const struct part *part)
{
	uint64_t address = part->leaf->address + part->at;
	int r = 0;

	if (part->leaf->kind == UFFD_LEAF_ZERO || batch->count == BATCH)
		r = copy_batch(batch);
	if (r)
		return r;
	if (part->leaf->kind == UFFD_LEAF_ZERO) {
		memset(batch->target, 0, part->length);
		batch->target += part->length;
		return 0;
	}
	batch->pieces[batch->count++] =
		(struct iovec){ (void *)(uintptr_t)address, part->length };
	batch->length += part->length;
	return 0;
}

int uffd_overlay_read(const struct uffd_overlay *overlay, void *target, uint64_t offset,
		      uint64_t length)
{
	struct batch batch = { .target = target };
	uint64_t at = offset, end = offset + length;
	int saved_errno = errno;
	int r = check_covered(overlay, offset, end);

	for (uint64_t run = run_at(overlay, at); at < end && r == 0; run++) {
		struct part part = part_at(overlay, run, at, end);

		r = copy_part(&batch, &part);
		at += part.length;
	}
	if (r == 0)
		r = copy_batch(&batch);
	if (r == 0)
		r = check_covered(overlay, offset, end);
	errno = saved_errno;
	return r;
}

void uffd_overlay_fault_in(const struct uffd_overlay *overlay, uint64_t offset, uint64_t length)
{
	uint64_t end = offset + length;

	for (uint64_t run = run_at(overlay, offset); offset < end; run++) {
		struct part part = part_at(overlay, run, offset, end);

		/* Faulting a file in costs more than what it saves the copy, unless it must be read. */
		if (part.leaf->kind == UFFD_LEAF_MEMORY ||
		    (part.leaf->kind == UFFD_LEAF_FILE &&
		     !uffd_file_is_cached(&part.leaf->file, part.at - part.leaf->file_from,
					  part.length)))
			uffd_fault_in(part.leaf->address + part.at, part.length, false);
		offset += part.length;
	}
}

/* Rooms for pages that are put together */

void *uffd_overlay_borrow(struct uffd_overlay *overlay)
{
	void *room = NULL;

	for (size_t i = 0; i < ROOMS && !room; i++)
		room = atomic_exchange(&overlay->rooms[i], NULL);
	if (room)
		return room;
	room = mmap(NULL, overlay->page_size, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return room == MAP_FAILED ? NULL : room;
}

void uffd_overlay_give_back(struct uffd_overlay *overlay, void *page)
{
	void *none = NULL;

	for (size_t i = 0; i < ROOMS && overlay->page_size <= LARGEST_KEPT; i++) {
		none = NULL;
		if (atomic_compare_exchange_strong(&overlay->rooms[i], &none, page))
			return;
	}
	munmap(page, overlay->page_size);
}
