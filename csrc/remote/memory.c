// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/page.h"
#include "dirty/ranges.h"
#include "remote/cold.h"
#include "remote/memory.h"

#define BATCH 512u /* iovecs a call; the kernel's limit is 1024 */
#define STEP (1u << 20) /* bytes through the buffer on the way to a file; stays in the cache */
#define MUCH (256u << 10)
#define FIND_STEP (64u << 10)
#define KCMP_VM 1

/* Ranges, from a place in one of them on. */
struct place {
	const struct uffd_page_region *vec;
	uint64_t count;
	uint64_t at;
	uint64_t inside;
};

static void advance(struct place *place, uint64_t bytes)
{
	while (bytes) {
		const struct uffd_page_region *range = &place->vec[place->at];
		uint64_t step = lower(bytes, range->end - range->start - place->inside);

		place->inside += step;
		bytes -= step;
		if (place->inside == range->end - range->start) {
			place->at++;
			place->inside = 0;
		}
	}
}

/* Lose the page at the place: zeros instead. */
static int lose(struct place *place, char *target, struct uffd_page_ranges *lost, uint64_t *bytes)
{
	const struct uffd_page_region *range = &place->vec[place->at];
	uint64_t address = range->start + place->inside;
	uint64_t next = (address / BASE_PAGE + 1) * BASE_PAGE;

	*bytes = lower(next, range->end) - address;
	memset(target, 0, *bytes);
	return uffd_ranges_append(lost, address / BASE_PAGE * BASE_PAGE, next);
}

/* Where the byte at a place goes. */
static uint64_t position(const struct place *place, uint64_t base, uint64_t packed)
{
	return base == UFFD_PACKED ? packed :
				     place->vec[place->at].start + place->inside - base;
}

static uint64_t rest_of_range(const struct place *place)
{
	return place->vec[place->at].end - place->vec[place->at].start - place->inside;
}

/* One call: as many ranges as fit, at most `most` bytes. */
static int read_batch(int32_t pid, struct uffd_cold *cold, struct place *place, char *target,
		      uint64_t base, uint64_t packed, uint64_t most, struct uffd_page_ranges *lost,
		      uint64_t *bytes_ret)
{
	struct iovec here[BATCH], there[BATCH];
	struct place next = *place;
	uint64_t wanted = 0;
	size_t used = 0;
	ssize_t n;

	if (cold->pidfd >= 0)
		most = lower(most, STEP);
	while (used < BATCH && next.at < next.count && wanted < most) {
		uint64_t bytes = lower(rest_of_range(&next), most - wanted);
		uint64_t from = next.vec[next.at].start + next.inside;

		here[used] = (struct iovec){ target + position(&next, base, packed + wanted), bytes };
		there[used++] = (struct iovec){ (void *)(uintptr_t)from, bytes };
		uffd_cold_note(cold, from, from + bytes);
		wanted += bytes;
		advance(&next, bytes);
	}
	n = process_vm_readv(pid, here, used, there, used, 0);
	uffd_cold_again(cold);
	if (n > 0) {
		advance(place, (uint64_t)n);
		*bytes_ret = (uint64_t)n;
		return 0;
	}
	if (n < 0 && errno != EFAULT)
		return -errno;
	n = lose(place, target + position(place, base, packed), lost, bytes_ret);
	advance(place, *bytes_ret);
	return (int)n;
}

/* Whether it is worth a look at how the process is. */
static bool is_much(const struct place *place)
{
	uint64_t bytes = 0;

	for (uint64_t i = 0; i < place->count && bytes < MUCH; i++)
		bytes += place->vec[i].end - place->vec[i].start;
	return bytes >= MUCH;
}

static int check_fits(const struct place *place, uint64_t base, uint64_t size)
{
	uint64_t packed = 0;

	for (uint64_t i = 0; i < place->count; i++) {
		const struct uffd_page_region *range = &place->vec[i];
		uint64_t bytes = range->end - range->start;
		uint64_t to = base == UFFD_PACKED ? packed : range->start - base;

		if ((base != UFFD_PACKED && range->start < base) || to > size || bytes > size - to)
			return -ENOSPC;
		packed += bytes;
	}
	return 0;
}

int uffd_remote_read(int32_t pid, const struct uffd_page_region *vec, uint64_t count, void *target,
		     uint64_t size, uint64_t base, struct uffd_page_ranges *lost_ret,
		     uint64_t *copied_ret)
{
	struct place place = { .vec = vec, .count = count };
	int ret = check_fits(&place, base, size);
	struct uffd_cold cold = { -1, -1, 0, { { NULL, 0 } } };

	if (is_much(&place))
		uffd_cold_open(&cold, pid);
	*copied_ret = 0;
	while (!ret && place.at < place.count) {
		uint64_t bytes = 0;

		ret = read_batch(pid, &cold, &place, target, base, *copied_ret, UINT64_MAX,
				 lost_ret, &bytes);
		*copied_ret += bytes;
	}
	uffd_cold_close(&cold);
	return ret;
}

static int write_all(int fd, const char *from, uint64_t length, uint64_t offset)
{
	while (length) {
		ssize_t n = pwrite(fd, from, length, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		from += n;
		offset += (uint64_t)n;
		length -= (uint64_t)n;
	}
	return 0;
}

int uffd_remote_read_to_file(int32_t pid, const struct uffd_page_region *vec, uint64_t count,
			     int fd, uint64_t offset, uint64_t base,
			     struct uffd_page_ranges *lost_ret, uint64_t *copied_ret)
{
	struct place place = { .vec = vec, .count = count };
	char *buffer = malloc(STEP);
	int ret = buffer ? check_fits(&place, base, UINT64_MAX) : -ENOMEM;
	struct uffd_cold cold;

	uffd_cold_open(&cold, pid);
	*copied_ret = 0;
	while (!ret && place.at < place.count) {
		uint64_t to = position(&place, base, *copied_ret);
		uint64_t most = base == UFFD_PACKED ? STEP : lower(STEP, rest_of_range(&place));
		uint64_t bytes = 0;

		ret = read_batch(pid, &cold, &place, buffer, UFFD_PACKED, 0, most, lost_ret,
				 &bytes);
		if (!ret)
			ret = write_all(fd, buffer, bytes, offset + to);
		if (!ret)
			*copied_ret += bytes;
	}
	uffd_cold_close(&cold);
	free(buffer);
	return ret;
}

int64_t uffd_remote_write(int32_t pid, uint64_t start, const void *source, uint64_t length)
{
	struct iovec here = { (void *)(uintptr_t)source, length };
	struct iovec there = { (void *)(uintptr_t)start, length };
	ssize_t n = process_vm_writev(pid, &here, 1, &there, 1, 0);

	return n < 0 ? -errno : n;
}

int uffd_remote_find(int32_t pid, uint64_t start, uint64_t end, const void *pattern,
		     uint64_t pattern_length, uint64_t *address_ret)
{
	char *buffer = malloc(FIND_STEP);
	int ret = buffer ? -ENOENT : -ENOMEM;
	uint64_t at = start;

	*address_ret = 0;
	while (ret == -ENOENT && at + pattern_length <= end) {
		uint64_t length = lower(FIND_STEP, end - at);
		struct iovec here = { buffer, length };
		struct iovec there = { (void *)(uintptr_t)at, length };
		ssize_t n = process_vm_readv(pid, &here, 1, &there, 1, 0);
		const char *found;

		if (n < 0 && errno != EFAULT) {
			ret = -errno;
			break;
		}
		found = n > 0 ? memmem(buffer, (size_t)n, pattern, pattern_length) : NULL;
		if (found) {
			*address_ret = at + (uint64_t)(found - buffer);
			ret = 0;
		} else if (n < (ssize_t)pattern_length) {
			at = (at / BASE_PAGE + 1) * BASE_PAGE;
		} else {
			/* The pattern may lie across two steps. */
			at += (uint64_t)n - pattern_length + 1;
		}
	}
	free(buffer);
	return ret;
}

int uffd_remote_same_memory(int32_t pid, int32_t other_pid)
{
	long r = syscall(SYS_kcmp, pid, other_pid, KCMP_VM, 0, 0);

	return r < 0 ? -errno : r == 0;
}
