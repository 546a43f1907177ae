// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/gentle.h"
#include "base/page.h"
#include "dirty/ranges.h"
#include "remote/cold.h"
#include "snapshot/image.h"
#include "uffd_transfer.h"

#define BATCH 512u /* iovecs a call; the kernel's limit is 1024 */
/* Scanning this much takes as long as another system call. */
#define SCAN_GAP (64u << 10)
#define STEP (1u << 20) /* bytes through the buffer; stays in the cache */

struct image {
	int32_t pid;
	int mem_fd;
	const struct uffd_image_piece *pieces;
	uint64_t pieces_count;
	int fd;
	uint32_t flags;
	struct uffd_page_ranges *zero;
	struct uffd_page_ranges *lost;
};

static bool is_zero(const void *page)
{
	const uint64_t *word = page;

	for (unsigned int i = 0; i < BASE_PAGE / sizeof(*word); i += 8)
		if (word[i] | word[i + 1] | word[i + 2] | word[i + 3] | word[i + 4] |
		    word[i + 5] | word[i + 6] | word[i + 7])
			return false;
	return true;
}

/* The piece that holds an address, or NULL. */
static const struct uffd_image_piece *piece_at(const struct uffd_image_piece *pieces,
					       uint64_t count, uint64_t address)
{
	uint64_t low = 0, high = count;

	while (low < high) {
		uint64_t middle = (low + high) / 2;

		if (pieces[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low < count && pieces[low].start <= address ? &pieces[low] : NULL;
}

static int write_at(int fd, const char *data, uint64_t length, uint64_t offset)
{
	uint64_t done = 0;
	int ret;

	do
		ret = uffd_transfer_write(fd, (int64_t)offset, data, length, &done);
	while (ret == -EINTR);
	return ret;
}

/* Read what a file has at a place; nothing behind its end counts as zeros. */
static int read_held(int fd, char *held, uint64_t length, uint64_t offset)
{
	uint64_t done = 0;
	int ret;

	do
		ret = uffd_transfer_read(fd, (int64_t)offset, held, length, &done);
	while (ret == -EINTR);
	if (ret == -ENODATA) {
		memset(held + done, 0, length - done);
		ret = 0;
	}
	return ret;
}

/* Write those pages that are not the same in the file already; runs of them, one call each. */
static int write_changed(int fd, const char *data, uint64_t length, uint64_t offset)
{
	char held[16 * BASE_PAGE];
	int ret = 0;

	for (uint64_t at = 0, step; !ret && at < length; at += step) {
		step = lower(length - at, sizeof(held));
		ret = read_held(fd, held, step, offset + at);
		for (uint64_t page = 0, stop; !ret && page < step; page = stop) {
			bool differs = memcmp(held + page, data + at + page, BASE_PAGE);

			stop = page;
			do
				stop += BASE_PAGE;
			while (stop < step &&
			       !!memcmp(held + stop, data + at + stop, BASE_PAGE) == differs);
			if (differs)
				ret = write_at(fd, data + at + page, stop - page, offset + at + page);
		}
	}
	return ret;
}

/* Write a run of pages to its place; what the file may hold there already depends on the flags. */
static int put_run(const struct image *image, bool zero, const char *data, uint64_t length,
		   uint64_t offset)
{
	if (image->flags & UFFD_IMAGE_IF_CHANGED)
		return write_changed(image->fd, data, length, offset);
	if (zero && !(image->flags & UFFD_IMAGE_OVERWRITE))
		return 0;
	return write_at(image->fd, data, length, offset);
}

/* Write pages that are at an address; runs of pages that are not zeros, one call each. */
static int put(const struct image *image, uint64_t address, const void *data, uint64_t length)
{
	const char *from = data;
	uint64_t at = 0;
	int ret = 0;

	while (!ret && at < length) {
		const struct uffd_image_piece *piece = piece_at(image->pieces, image->pieces_count,
							       address + at);
		bool zero = is_zero(from + at);
		uint64_t stop = at, limit;

		if (!piece)
			return -EINVAL;
		limit = lower(length, piece->end - address);
		do
			stop += BASE_PAGE;
		while (stop < limit && is_zero(from + stop) == zero);
		if (zero)
			ret = uffd_ranges_append(image->zero, address + at, address + stop);
		if (!ret)
			ret = put_run(image, zero, from + at, stop - at,
				      piece->offset + (address + at - piece->start));
		at = stop;
	}
	return ret;
}

/* Ranges, from a place in one of them on. */
struct place {
	const struct uffd_page_region *vec;
	uint64_t count;
	uint64_t at;
	uint64_t inside;
};

static uint64_t address_of(const struct place *place)
{
	return place->vec[place->at].start + place->inside;
}

static uint64_t rest_of_range(const struct place *place)
{
	return place->vec[place->at].end - address_of(place);
}

static void advance(struct place *place, uint64_t bytes)
{
	while (bytes) {
		uint64_t rest = rest_of_range(place), step = lower(bytes, rest);

		place->inside += step;
		bytes -= step;
		if (step == rest) {
			place->at++;
			place->inside = 0;
		}
	}
}

/* One page that process_vm_readv(2) cannot read. */
static int read_other_way(const struct image *image, uint64_t address, char *target)
{
	ssize_t n = image->mem_fd < 0 ? -1 :
					pread(image->mem_fd, target, BASE_PAGE, (off_t)address);

	if (n == BASE_PAGE)
		return 0;
	memset(target, 0, BASE_PAGE);
	return uffd_ranges_append(image->lost, address, address + BASE_PAGE);
}

/* Fill the buffer from a place on; bytes_ret: whole pages. */
static int read_batch(const struct image *image, struct uffd_cold *cold, const struct place *place,
		      char *buffer, uint64_t *bytes_ret)
{
	struct iovec here = { buffer, 0 }, there[BATCH];
	struct place next = *place;
	size_t used = 0;
	ssize_t n;

	while (used < BATCH && next.at < next.count && here.iov_len < STEP) {
		uint64_t bytes = lower(rest_of_range(&next), STEP - here.iov_len);

		there[used++] = (struct iovec){ (void *)(uintptr_t)address_of(&next), bytes };
		uffd_cold_note(cold, address_of(&next), address_of(&next) + bytes);
		here.iov_len += bytes;
		advance(&next, bytes);
	}
	n = process_vm_readv(image->pid, &here, 1, there, used, 0);
	if (n >= (ssize_t)BASE_PAGE) {
		*bytes_ret = (uint64_t)n / BASE_PAGE * BASE_PAGE;
		return 0;
	}
	if (n < 0 && errno != EFAULT)
		return -errno;
	*bytes_ret = BASE_PAGE;
	return read_other_way(image, address_of(place), buffer);
}

/* Write what is in the buffer, and go on behind it. */
static int write_batch(const struct image *image, struct place *place, const char *buffer,
		       uint64_t bytes)
{
	uint64_t at = 0;
	int ret = 0;

	while (!ret && at < bytes) {
		uint64_t length = lower(bytes - at, rest_of_range(place));

		ret = put(image, address_of(place), buffer + at, length);
		at += length;
		advance(place, length);
	}
	return ret;
}

struct copy {
	struct image image;
	struct place place;
	uint64_t done;
	int ret;
};

static void copy_all(void *argument)
{
	struct copy *copy = argument;
	char *buffer = malloc(STEP);
	int ret = buffer ? 0 : -ENOMEM;
	struct uffd_cold cold;

	uffd_cold_open(&cold, copy->image.pid);
	while (!ret && copy->place.at < copy->place.count) {
		uint64_t bytes = 0;

		ret = read_batch(&copy->image, &cold, &copy->place, buffer, &bytes);
		uffd_cold_again(&cold);
		if (!ret)
			ret = write_batch(&copy->image, &copy->place, buffer, bytes);
		if (!ret)
			copy->done += bytes;
	}
	uffd_cold_close(&cold);
	free(buffer);
	copy->ret = ret;
}

int uffd_image_copy(int32_t pid, int mem_fd, const struct uffd_page_region *vec, uint64_t count,
		    const struct uffd_image_piece *pieces, uint64_t pieces_count, int fd,
		    uint32_t flags, struct uffd_page_ranges *zero_ret,
		    struct uffd_page_ranges *lost_ret, uint64_t *done_ret)
{
	struct copy copy = {
		.image = { pid, mem_fd, pieces, pieces_count, fd, flags, zero_ret, lost_ret },
		.place = { .vec = vec, .count = count },
	};

	if (flags & UFFD_IMAGE_GENTLE)
		uffd_gently(copy_all, &copy);
	else
		copy_all(&copy);
	*done_ret = copy.done;
	return copy.ret;
}

void uffd_image_begin_sync(int fd)
{
	sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
}

int uffd_image_write(const struct uffd_page_region *vec, uint64_t count, const void *data,
		     const struct uffd_image_piece *pieces, uint64_t pieces_count, int fd,
		     uint32_t flags, struct uffd_page_ranges *zero_ret)
{
	struct image image = { -1, -1, pieces, pieces_count, fd, flags, zero_ret, NULL };
	const char *from = data;
	int ret = 0;

	for (uint64_t i = 0; !ret && i < count; i++) {
		ret = put(&image, vec[i].start, from, vec[i].end - vec[i].start);
		from += vec[i].end - vec[i].start;
	}
	return ret;
}

struct scan {
	int pagemap_fd;
	struct uffd_pm_scan_arg arg;
	struct uffd_page_ranges found;
	struct uffd_page_ranges *ranges, *swapped;
};

static int scan_range(struct scan *scan, uint64_t start, uint64_t end)
{
	struct uffd_pm_scan_arg arg = scan->arg;
	uint64_t walked = 0;
	int ret;

	arg.start = start;
	arg.end = end;
	scan->found.count = 0;
	ret = uffd_pagemap_scan_all(scan->pagemap_fd, &arg, &scan->found, &walked);
	for (uint64_t i = 0; !ret && i < scan->found.count; i++) {
		const struct uffd_page_region *at = &scan->found.vec[i];

		ret = uffd_ranges_append(scan->ranges, at->start, at->end);
		if (!ret && at->categories & UFFD_PAGE_IS_SWAPPED)
			ret = uffd_ranges_append(scan->swapped, at->start, at->end);
	}
	return ret;
}

/* Ranges of a piece; *at: the first that may reach into it, and then into the next piece. */
static int scan_within(struct scan *scan, const struct uffd_image_piece *piece,
		       const struct uffd_image_ranges *within, uint64_t *at)
{
	int ret = 0;

	while (*at < within->count && within->vec[*at].end <= piece->start)
		(*at)++;
	while (!ret && *at < within->count && within->vec[*at].start < piece->end) {
		uint64_t start = higher(within->vec[*at].start, piece->start);
		uint64_t end = within->vec[*at].end;

		while (*at + 1 < within->count && within->vec[*at + 1].start < piece->end &&
		       within->vec[*at + 1].start - end <= SCAN_GAP)
			end = within->vec[++*at].end;
		ret = scan_range(scan, start, lower(end, piece->end));
		if (end > piece->end)
			break;
		(*at)++;
	}
	return ret;
}

int uffd_image_scan(int pagemap_fd, const struct uffd_image_piece *pieces, const uint32_t *what,
		    uint64_t count, uint32_t flags, const struct uffd_image_ranges *within,
		    struct uffd_page_ranges *ranges_ret, struct uffd_page_ranges *swapped_ret)
{
	struct scan scan = { .pagemap_fd = pagemap_fd, .ranges = ranges_ret,
			     .swapped = swapped_ret };
	uint64_t at = 0;
	int ret = 0;

	for (uint64_t i = 0; !ret && i < count; i++) {
		scan.arg = (struct uffd_pm_scan_arg){
			.vec_len = UINT64_MAX,
			.category_anyof_mask = UFFD_PAGE_IS_PRESENT | UFFD_PAGE_IS_SWAPPED,
			.return_mask = UFFD_PAGE_IS_SWAPPED,
		};
		if (what[i] == UFFD_IMAGE_OWN) {
			scan.arg.category_mask |= UFFD_PAGE_IS_FILE;
			scan.arg.category_inverted |= UFFD_PAGE_IS_FILE;
		}
		if (flags & UFFD_IMAGE_UNPROTECTED)
			scan.arg.category_mask |= UFFD_PAGE_IS_WRITTEN;
		ret = within ? scan_within(&scan, &pieces[i], within, &at) :
			       scan_range(&scan, pieces[i].start, pieces[i].end);
	}
	free(scan.found.vec);
	return ret;
}

int uffd_image_differ(const void *a, const void *b, uint64_t length, uint64_t start,
		      struct uffd_page_ranges *ranges_ret)
{
	int ret = 0;

	for (uint64_t at = 0; !ret && at < length; at += BASE_PAGE)
		if (memcmp((const char *)a + at, (const char *)b + at, lower(BASE_PAGE, length - at)))
			ret = uffd_ranges_append(ranges_ret, start + at, start + at + BASE_PAGE);
	return ret;
}
