// SPDX-License-Identifier: MIT
/* Unmappings whose events are still to come. */
#define _GNU_SOURCE
#include "alloc.h"
#include "expected.h"

void expect_unmap(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct expected_unmap *expected;

	if (start >= end || !(space->layout_events & UFFD_FEATURE_EVENT_UNMAP))
		return;
	expected = uffd_alloc(sizeof(*expected));
	if (!expected)
		return;
	*expected = (struct expected_unmap){ space->expected, start, end };
	space->expected = expected;
}

struct expected_unmap *take_expected(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct expected_unmap **link = &space->expected, *expected;

	while ((expected = *link) && (expected->end <= start || expected->start >= end))
		link = &expected->next;
	if (!expected)
		return NULL;
	*link = expected->next;
	expect_unmap(space, expected->start, lower(expected->end, start));
	expect_unmap(space, higher(expected->start, end), expected->end);
	return expected;
}

void drop_expected(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct expected_unmap *expected;

	while ((expected = take_expected(space, start, end)))
		uffd_free(expected);
}
