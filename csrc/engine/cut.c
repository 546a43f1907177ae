// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>

#include "cut.h"
#include "range.h"

static void free_rest(struct cut *cut)
{
	while (cut->count)
		range_free(cut->rest[--cut->count]);
}

static int make_rest(struct cut *cut, uint64_t from, uint64_t stop)
{
	const struct uffd_range *range = cut->range;
	uint64_t starts[] = { range->start, stop }, ends[] = { from, range->end };

	for (size_t i = 0; i < 2; i++) {
		struct uffd_range *piece;

		if (starts[i] == ends[i])
			continue;
		piece = range_create(range->space, range, starts[i], ends[i],
				     content_offset(range, starts[i]));
		if (!piece)
			return -ENOMEM;
		cut->rest[cut->count++] = piece;
	}
	return 0;
}

int cut_begin(struct uffd_range *range, uint64_t from, uint64_t stop, struct cut *ret)
{
	int r;

	*ret = (struct cut){ .range = range };
	r = make_rest(ret, from, stop);
	if (r == 0 && ret->count == 2)
		r = uffd_table_reserve(range->space->table);
	if (r)
		free_rest(ret);
	return r;
}

void cut_finish(struct cut *cut)
{
	struct uffd_range *range = cut->range;

	range->has_readers =
		!uffd_table_replace(range->space->table, range, cut->rest, cut->count);
	range_discard(range);
}

void cut_cancel(struct cut *cut)
{
	if (cut->count == 2)
		uffd_table_unreserve(cut->range->space->table);
	free_rest(cut);
}
