// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "alloc.h"
#include "base/page.h"
#include "content.h"

/* Open the last page of a source that is not whole: the rest of its bytes, then zeros. */
static int open_tail(const struct uffd_content *content, const struct uffd_range_spec *spec,
		     struct uffd_overlay **ret)
{
	const bool is_file = spec->source == UFFD_SOURCE_FILE;
	const struct uffd_leaf_spec leaves[] = {
		{
			.kind = is_file ? UFFD_LEAF_FILE : UFFD_LEAF_MEMORY,
			.fd = spec->source_fd,
			.address = spec->source_address + content->length,
			.offset = spec->source_offset + content->length,
		},
		{ .kind = UFFD_LEAF_ZERO, .fd = -1 },
	};
	const struct uffd_run_spec runs[] = {
		{ .start = 0, .leaf = 0 },
		{ .start = spec->source_length - content->length, .leaf = 1 },
	};
	const struct uffd_overlay_spec tail = {
		.leaves = leaves,
		.leaf_count = 2,
		.runs = runs,
		.run_count = 2,
	};

	return uffd_overlay_create(&tail, content->page_size, content->page_size, true, ret);
}

/*
 * Copy the bytes now: a seccomp filter refuses process_vm_readv(2), which reads an overlay.
 */
static int keep_tail(struct uffd_content *content, const struct uffd_range_spec *spec)
{
	uint64_t left = spec->source_length - content->length;

	content->kept = uffd_alloc(content->page_size);
	if (!content->kept)
		return -ENOMEM;
	if (spec->source == UFFD_SOURCE_FILE)
		return uffd_file_read_from(spec->source_fd, content->kept, left,
					   spec->source_offset + content->length);
	memcpy(content->kept, (void *)(uintptr_t)(spec->source_address + content->length), left);
	return 0;
}

static int make_tail(struct uffd_content *content, const struct uffd_range_spec *spec)
{
	int r = open_tail(content, spec, &content->tail);

	return r == -EPERM || r == -ENOSYS ? keep_tail(content, spec) : r;
}

static int open_source(struct uffd_content *content, const struct uffd_range_spec *spec)
{
	int r = 0;

	if (spec->source == UFFD_SOURCE_REQUEST && spec->overlay.is_outline)
		return uffd_overlay_create(&spec->overlay, spec->length, spec->page_size, false,
					   &content->outline);
	if (spec->source == UFFD_SOURCE_OVERLAY ||
	    (spec->source == UFFD_SOURCE_REQUEST && spec->overlay.run_count))
		return uffd_overlay_create(&spec->overlay, spec->length, spec->page_size,
					   spec->writes_cache, &content->overlay);
	if (spec->source != UFFD_SOURCE_MEMORY && spec->source != UFFD_SOURCE_FILE)
		return 0;
	if (spec->source_length <= spec->length - spec->page_size)
		return -ENODATA;
	content->length = spec->source_length >= spec->length ? spec->length
							      : spec->length - spec->page_size;
	content->address = spec->source_address;
	if (spec->source == UFFD_SOURCE_FILE) {
		r = uffd_file_open(&content->file, spec->source_fd, spec->source_offset,
				   content->length, spec->writes_cache, 0);
		content->address = content->file.address;
	}
	if (r == 0 && spec->source_length < spec->length)
		r = make_tail(content, spec);
	return r;
}

int uffd_content_create(const struct uffd_range_spec *spec, struct uffd_content **ret)
{
	struct uffd_content *content = uffd_alloc(sizeof(*content));
	int r;

	*ret = NULL;
	if (!content)
		return -ENOMEM;
	atomic_store(&content->references, 1);
	content->kind = spec->source;
	content->page_size = spec->page_size;
	content->file.fd = -1;
	content->local = spec->local;
	content->preserve = spec->preserve;
	content->writes_cache = spec->writes_cache;
	content->maps_holes = spec->maps_holes;
	content->shared = spec->shared;
	memcpy(content->label, spec->label, sizeof(content->label) - 1);
	r = open_source(content, spec);
	if (r) {
		uffd_content_put(content);
		return r;
	}
	*ret = content;
	return 0;
}

struct uffd_content *uffd_content_get(struct uffd_content *content)
{
	atomic_fetch_add(&content->references, 1);
	return content;
}

void uffd_content_put(struct uffd_content *content)
{
	if (atomic_fetch_sub(&content->references, 1) != 1)
		return;
	uffd_file_close(&content->file);
	uffd_overlay_destroy(content->overlay);
	uffd_overlay_destroy(content->outline);
	uffd_overlay_destroy(content->tail);
	uffd_overlay_destroy(atomic_load(&content->grown));
	uffd_free(content->kept);
	uffd_free(content);
}

int uffd_content_read_tail(const struct uffd_content *content, void *target)
{
	struct uffd_overlay *grown = atomic_load(&content->grown);

	if (content->kept) {
		memcpy(target, content->kept, content->page_size);
		return 0;
	}
	if (grown && uffd_overlay_read(grown, target, 0, content->page_size) == 0)
		return 0;
	return uffd_overlay_read(content->tail, target, 0, content->page_size);
}

int uffd_content_let_grow(struct uffd_content *content, int fd, uint64_t begin)
{
	struct uffd_leaf_spec leaf = {
		.kind = UFFD_LEAF_FILE,
		.offset = content->file.offset + content->length,
	};
	const struct uffd_run_spec run = { .start = 0 };
	const struct uffd_overlay_spec spec = {
		.leaves = &leaf,
		.leaf_count = 1,
		.runs = &run,
		.run_count = 1,
	};
	struct uffd_overlay *grown, *none = NULL;
	int r;

	if (!content->tail || content->kind != UFFD_SOURCE_FILE || atomic_load(&content->grown) ||
	    begin != content->file.offset || !uffd_file_is(&content->file, fd))
		return 0;
	leaf.fd = uffd_file_reopen(fd);
	if (leaf.fd < 0)
		return leaf.fd;
	r = uffd_overlay_create(&spec, content->page_size, content->page_size, true, &grown);
	close(leaf.fd);
	if (r)
		return r;
	if (!atomic_compare_exchange_strong(&content->grown, &none, grown))
		uffd_overlay_destroy(grown);
	return 0;
}

uint64_t uffd_content_covered(const struct uffd_content *content, uint64_t offset,
			      uint64_t length)
{
	uint64_t covered = length;

	if (content->kind == UFFD_SOURCE_FILE && offset < content->length)
		covered = uffd_file_covered(&content->file, offset, length);
	return covered == length ? length : covered & ~(content->page_size - 1);
}

uint64_t uffd_content_stretch(const struct uffd_content *content, uint64_t offset,
			      uint64_t length, bool *zeros_ret)
{
	const struct uffd_overlay *overlay = content->overlay ? content->overlay : content->outline;
	struct uffd_stretch stretch;

	/* The page cache, to which zeros were to be written, may hold something else. */
	*zeros_ret = content->kind == UFFD_SOURCE_ZERO && !content->writes_cache;
	if (!overlay)
		return length;
	stretch = uffd_overlay_stretch(overlay, offset, length);
	*zeros_ret = stretch.kind == UFFD_STRETCH_ZERO && !content->writes_cache;
	return stretch.length;
}

bool uffd_content_is_requested(const struct uffd_content *content, uint64_t offset)
{
	if (content->kind != UFFD_SOURCE_REQUEST || !content->overlay)
		return content->kind == UFFD_SOURCE_REQUEST;
	return uffd_overlay_stretch(content->overlay, offset, content->page_size).kind ==
	       UFFD_STRETCH_REQUEST;
}

int uffd_content_read(const struct uffd_content *content, void *target, uint64_t offset,
		      uint64_t length)
{
	if (content->overlay)
		return uffd_overlay_read(content->overlay, target, offset, length);
	if (content->kind == UFFD_SOURCE_ZERO)
		memset(target, 0, length);
	else if (offset >= content->length)
		return uffd_content_read_tail(content, target);
	else if (content->kind == UFFD_SOURCE_FILE)
		return uffd_file_read(&content->file, target, offset, length);
	else
		memcpy(target, (void *)(uintptr_t)(content->address + offset), length);
	return 0;
}

/* With room for `own` states. */
static struct uffd_pages *create_pages(uint64_t count, uint64_t own)
{
	uint64_t words = (count + 63) / 64;
	struct uffd_pages *pages =
		uffd_alloc(sizeof(*pages) + words * sizeof(*pages->written) + own);

	if (!pages)
		return NULL;
	atomic_store(&pages->references, 1);
	pages->count = count;
	pages->state = (_Atomic uint8_t *)(pages->written + words);
	return pages;
}

struct uffd_pages *uffd_pages_create(uint64_t count, uint8_t state)
{
	struct uffd_pages *pages = create_pages(count, count);

	if (pages && state)
		memset((void *)pages->state, state, count);
	return pages;
}

uint64_t uffd_pages_file_length(uint64_t count)
{
	return (count + BASE_PAGE - 1) & ~(uint64_t)(BASE_PAGE - 1);
}

/* The state of a page without the thread that had it in flight. */
static uint8_t landed(uint8_t state)
{
	if (state == UFFD_PAGE_HELD)
		return UFFD_PAGE_DIRTY;
	return uffd_page_is_in_flight(state) ? UFFD_PAGE_ABSENT : state;
}

struct uffd_pages *uffd_pages_map(int fd, uint64_t offset, uint64_t count)
{
	struct uffd_pages *pages = create_pages(count, 0);
	uint64_t length = uffd_pages_file_length(count);
	void *mapping;

	if (!pages)
		return NULL;
	mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
	if (mapping == MAP_FAILED) {
		uffd_free(pages);
		return NULL;
	}
	pages->mapped = length;
	pages->states_offset = offset;
	pages->state = mapping;
	for (uint64_t i = 0; i < count; i++)
		atomic_store_explicit(&pages->state[i],
				      landed(atomic_load_explicit(&pages->state[i],
								  memory_order_relaxed)),
				      memory_order_relaxed);
	return pages;
}

/* For a fork: pages in flight arrive in the parent only. */
struct uffd_pages *uffd_pages_clone(const struct uffd_pages *pages, int fd, uint64_t offset)
{
	struct uffd_pages *copy = fd < 0 ? uffd_pages_create(pages->count, 0)
					 : uffd_pages_map(fd, offset, pages->count);

	if (!copy)
		return NULL;
	for (uint64_t i = 0; i < pages->count; i++) {
		uint8_t state = atomic_load_explicit(&pages->state[i], memory_order_relaxed);

		atomic_store_explicit(&copy->state[i],
				      landed(state), memory_order_relaxed);
	}
	return copy;
}

struct uffd_pages *uffd_pages_get(struct uffd_pages *pages)
{
	atomic_fetch_add(&pages->references, 1);
	return pages;
}

void uffd_pages_put(struct uffd_pages *pages)
{
	if (atomic_fetch_sub(&pages->references, 1) != 1)
		return;
	if (pages->mapped)
		munmap((void *)pages->state, pages->mapped);
	uffd_free(pages);
}
