// SPDX-License-Identifier: MIT
#include <errno.h>
#include <stdlib.h>

#include "base/array.h"
#include "dirty/ranges.h"

#define FIRST_CAPACITY 64u

int uffd_ranges_append_row(struct uffd_page_ranges *ranges, uint64_t start, uint64_t end,
			   uint64_t categories)
{
	int ret = uffd_array_grow((void **)&ranges->vec, &ranges->capacity, ranges->count + 1,
				  FIRST_CAPACITY, sizeof(*ranges->vec));

	if (ret == 0)
		ranges->vec[ranges->count++] = (struct uffd_page_region){ start, end, categories };
	return ret;
}

int uffd_ranges_append(struct uffd_page_ranges *ranges, uint64_t start, uint64_t end)
{
	if (start >= end)
		return 0;
	if (ranges->count && ranges->vec[ranges->count - 1].end == start) {
		ranges->vec[ranges->count - 1].end = end;
		return 0;
	}
	return uffd_ranges_append_row(ranges, start, end, 0);
}

int uffd_ranges_union(const struct uffd_page_region *a, uint64_t a_count,
		      const struct uffd_page_region *b, uint64_t b_count,
		      struct uffd_page_ranges *ranges_ret)
{
	uint64_t i = 0, j = 0;
	int ret = 0;

	while (!ret && (i < a_count || j < b_count)) {
		const struct uffd_page_region *next;
		uint64_t reached = ranges_ret->count ? ranges_ret->vec[ranges_ret->count - 1].end : 0;

		if (j == b_count || (i < a_count && a[i].start <= b[j].start))
			next = &a[i++];
		else
			next = &b[j++];
		/* The part that the last range covers already is left out; what follows it joins it. */
		ret = uffd_ranges_append(ranges_ret, next->start > reached ? next->start : reached,
					 next->end);
	}
	return ret;
}

int uffd_ranges_subtract(const struct uffd_page_region *a, uint64_t a_count,
			 const struct uffd_page_region *b, uint64_t b_count,
			 struct uffd_page_ranges *ranges_ret)
{
	uint64_t j = 0;
	int ret = 0;

	for (uint64_t i = 0; !ret && i < a_count; i++) {
		uint64_t at = a[i].start;

		while (j < b_count && b[j].end <= at)
			j++;
		for (uint64_t k = j; !ret && k < b_count && b[k].start < a[i].end; k++) {
			ret = uffd_ranges_append(ranges_ret, at, b[k].start);
			if (b[k].end > at)
				at = b[k].end;
		}
		if (!ret)
			ret = uffd_ranges_append(ranges_ret, at, a[i].end);
	}
	return ret;
}

int uffd_ranges_intersect(const struct uffd_page_region *a, uint64_t a_count,
			  const struct uffd_page_region *b, uint64_t b_count,
			  struct uffd_page_ranges *ranges_ret)
{
	uint64_t i = 0, j = 0;
	int ret = 0;

	while (!ret && i < a_count && j < b_count) {
		uint64_t start = a[i].start > b[j].start ? a[i].start : b[j].start;
		uint64_t end = a[i].end < b[j].end ? a[i].end : b[j].end;

		ret = uffd_ranges_append(ranges_ret, start, end);
		if (a[i].end < b[j].end)
			i++;
		else
			j++;
	}
	return ret;
}

int uffd_ranges_bytes_in(const struct uffd_page_region *a, uint64_t a_count,
			 const struct uffd_page_region *spans, uint64_t spans_count,
			 uint64_t *bytes_ret)
{
	uint64_t i = 0;

	for (uint64_t j = 0; j < spans_count; j++) {
		uint64_t bytes = 0;

		while (i < a_count && a[i].end <= spans[j].start)
			i++;
		/* The last of them may reach into the next span. */
		for (uint64_t k = i; k < a_count && a[k].start < spans[j].end; k++) {
			uint64_t start = a[k].start > spans[j].start ? a[k].start : spans[j].start;
			uint64_t end = a[k].end < spans[j].end ? a[k].end : spans[j].end;

			bytes += end - start;
			if (a[k].end <= spans[j].end)
				i = k + 1;
		}
		bytes_ret[j] = bytes;
	}
	return 0;
}
