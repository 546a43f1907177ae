// SPDX-License-Identifier: MIT
/* Unmappings whose events are still to come. */
#define _GNU_SOURCE
#include <errno.h>

#include "alloc.h"
#include "expected.h"
#include "failures.h"

void expect_unmap(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct expected_unmap *expected;

	if (start >= end || !(space->layout_events & UFFD_FEATURE_EVENT_UNMAP))
		return;
	expected = uffd_alloc(sizeof(*expected));
	if (!expected) {
		note_failure(space->engine, start, end - start, -ENOMEM, UFFD_FAILED_RESOLVE);
		return;
	}
	*expected = (struct expected_unmap){ space->expected, start, end };
	space->expected = expected;
}

/*
 * Take [start, end) out of one that reaches beyond it; false if it has become empty.  Without
 * memory for a second one it stays whole: an unmapping that is ignored leaves a piece that
 * nothing faults in, but one that is not expected would take out what was served since.
 */
static bool shorten(struct uffd_space *space, struct expected_unmap *expected, uint64_t start,
		    uint64_t end)
{
	struct expected_unmap *behind = NULL;

	if (expected->start < start && expected->end > end) {
		behind = uffd_alloc(sizeof(*behind));
		if (!behind) {
			note_failure(space->engine, start, end - start, -ENOMEM,
				     UFFD_FAILED_RESOLVE);
			return true;
		}
		*behind = (struct expected_unmap){ expected->next, end, expected->end };
		expected->next = behind;
		expected->end = start;
	} else if (expected->start < start) {
		expected->end = start;
	} else {
		expected->start = end;
	}
	return expected->start < expected->end;
}

bool take_expected(struct uffd_space *space, uint64_t start, uint64_t end, uint64_t *from_ret,
		   uint64_t *to_ret)
{
	struct expected_unmap **link = &space->expected, *expected;

	while ((expected = *link) && (expected->end <= start || expected->start >= end))
		link = &expected->next;
	if (!expected)
		return false;
	*from_ret = higher(expected->start, start);
	*to_ret = lower(expected->end, end);
	if (!shorten(space, expected, *from_ret, *to_ret)) {
		*link = expected->next;
		uffd_free(expected);
	}
	return true;
}

void drop_expected(struct uffd_space *space)
{
	struct expected_unmap *expected;

	while ((expected = space->expected)) {
		space->expected = expected->next;
		uffd_free(expected);
	}
}
