// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "alloc.h"
#include "base.h"
#include "content.h"

#define BASE_PAGE 4096u
/* linux/fs.h, linux/magic.h */
#define BLKGETSIZE64 _IOR(0x12, 114, size_t)
#define HUGETLBFS_MAGIC 0x958458f6

static int read_file_fully(int fd, void *buffer, uint64_t length, uint64_t offset)
{
	uint64_t done = 0;

	while (done < length) {
		ssize_t n = pread(fd, (char *)buffer + done, length - done, (off_t)(offset + done));

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

static int open_file(struct uffd_content *content, const struct uffd_range_spec *spec)
{
	uint64_t unit = mapping_unit(spec->source_fd);
	uint64_t lead = spec->source_offset % unit;
	void *mapping;

	content->fd = spec->writes_cache ? -1 : name_file(spec->source_fd);
	if (content->fd < 0)
		content->fd = fcntl(spec->source_fd, F_DUPFD_CLOEXEC, 3);
	if (content->fd < 0)
		return -errno;
	content->file_offset = spec->source_offset;
	content->sealed = is_sealed(spec->source_fd);
	if (!content->length)
		return 0;
	/*
	 * Map it, so that UFFDIO_COPY reads the page cache itself.  If the file ends
	 * early the ioctl fails with EFAULT; nothing else touches the mapping.
	 */
	content->mapped = (content->length + lead + unit - 1) & ~(unit - 1);
	mapping = mmap(NULL, content->mapped, PROT_READ, MAP_SHARED, spec->source_fd,
		       (off_t)(spec->source_offset - lead));
	if (mapping == MAP_FAILED) {
		content->mapped = 0;
		return -errno;
	}
	content->mapping = mapping;
	content->address = (uint64_t)(uintptr_t)mapping + lead;
	return 0;
}

/* The source ends inside the last page: keep a copy, padded with zeros as mmap does. */
static int keep_tail(struct uffd_content *content, const struct uffd_range_spec *spec)
{
	uint64_t left = spec->source_length - content->length;

	content->tail = uffd_alloc(content->page_size);
	if (!content->tail)
		return -ENOMEM;
	if (spec->source == UFFD_SOURCE_FILE)
		return read_file_fully(spec->source_fd, content->tail, left,
				       spec->source_offset + content->length);
	memcpy(content->tail, (void *)(uintptr_t)(spec->source_address + content->length), left);
	return 0;
}

static int open_source(struct uffd_content *content, const struct uffd_range_spec *spec)
{
	int r = 0;

	if (spec->source != UFFD_SOURCE_MEMORY && spec->source != UFFD_SOURCE_FILE)
		return 0;
	if (spec->source_length <= spec->length - spec->page_size)
		return -ENODATA;
	content->length = spec->source_length >= spec->length ? spec->length
							      : spec->length - spec->page_size;
	content->address = spec->source_address;
	if (spec->source == UFFD_SOURCE_FILE)
		r = open_file(content, spec);
	if (r == 0 && spec->source_length < spec->length)
		r = keep_tail(content, spec);
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
	content->fd = -1;
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
	if (content->mapped)
		munmap(content->mapping, content->mapped);
	if (content->fd >= 0)
		close(content->fd);
	uffd_free(content->tail);
	uffd_free(content);
}

uint64_t uffd_content_address(const struct uffd_content *content, uint64_t offset)
{
	if (offset >= content->length)
		return (uint64_t)(uintptr_t)content->tail;
	return content->address + offset;
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

uint64_t uffd_content_covered(const struct uffd_content *content, uint64_t offset,
			      uint64_t length)
{
	uint64_t from = content->file_offset + offset;
	uint64_t size;

	if (content->kind != UFFD_SOURCE_FILE || content->sealed || offset >= content->length)
		return length;
	size = file_size(content->fd);
	if (size >= from + length)
		return length;
	return size <= from ? 0 : (size - from) & ~(content->page_size - 1);
}

int uffd_content_read(const struct uffd_content *content, void *target, uint64_t offset,
		      uint64_t length)
{
	if (content->kind == UFFD_SOURCE_ZERO)
		memset(target, 0, length);
	else if (offset >= content->length)
		memcpy(target, content->tail, length);
	else if (content->kind == UFFD_SOURCE_FILE)
		return read_file_fully(content->fd, target, length, content->file_offset + offset);
	else
		memcpy(target, (void *)(uintptr_t)(content->address + offset), length);
	return 0;
}

struct uffd_pages *uffd_pages_create(uint64_t count, uint8_t state)
{
	struct uffd_pages *pages = uffd_alloc(sizeof(*pages) + count);

	if (!pages)
		return NULL;
	atomic_store(&pages->references, 1);
	pages->count = count;
	pages->state = pages->own;
	if (state)
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
	struct uffd_pages *pages = uffd_pages_create(0, 0);
	uint64_t length = uffd_pages_file_length(count);
	void *mapping;

	if (!pages)
		return NULL;
	mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
	if (mapping == MAP_FAILED) {
		uffd_free(pages);
		return NULL;
	}
	pages->count = count;
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
