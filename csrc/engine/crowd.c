// SPDX-License-Identifier: MIT
#define _GNU_SOURCE

#include "crowd.h"
#include "page_table.h"
#include "uffd_shim.h"
#include "base/clock.h"

/*
 * Calls that wake, for one crowd.  More would let the first threads continue earlier; each costs
 * a look at all threads.
 */
#define MOST_WAKES	16u
/* A thread waits at most this long for pages of others to be put in place. */
#define LATE_NS		1000000u

struct late_wakes late_wakes_for(size_t faults)
{
	return (struct late_wakes){ .most = (uint32_t)(faults + MOST_WAKES - 1) / MOST_WAKES };
}

void wake_late(struct late_wakes *late)
{
	if (late->from < late->to)
		uffd_shim_wake(late->space->fd, late->from, late->to - late->from);
	late->from = late->to = 0;
	late->count = 0;
}

void wake_later(struct late_wakes *late, struct uffd_space *space, uint64_t page,
		uint64_t page_size)
{
	/* What lies between two pages must not be the page of a thread that has to wait. */
	if (late->count && (late->space != space || page < late->from))
		wake_late(late);
	if (!late->count) {
		late->space = space;
		late->from = page;
		late->since_ns = uffd_now_ns();
	}
	late->to = higher(late->to, page + page_size);
	if (++late->count >= late->most || uffd_now_ns() - late->since_ns > LATE_NS)
		wake_late(late);
}

static bool is_before(const struct deferred_fault *one, const struct deferred_fault *other)
{
	if (one->space != other->space)
		return one->space->number < other->space->number;
	return one->address < other->address;
}

/* Let the fault at `at` sink to its place in the heap. */
static void sink(struct deferred_fault *faults, size_t at, size_t count)
{
	struct deferred_fault fault = faults[at];

	for (size_t child; (child = 2 * at + 1) < count; at = child) {
		if (child + 1 < count && is_before(&faults[child], &faults[child + 1]))
			child++;
		if (!is_before(&fault, &faults[child]))
			break;
		faults[at] = faults[child];
	}
	faults[at] = fault;
}

static bool is_sorted(const struct deferred_fault *faults, size_t count)
{
	for (size_t i = 1; i < count; i++)
		if (is_before(&faults[i], &faults[i - 1]))
			return false;
	return true;
}

void sort_faults(struct deferred_fault *faults, size_t count)
{
	if (is_sorted(faults, count))
		return;
	for (size_t i = count / 2; i--;)
		sink(faults, i, count);
	for (size_t left = count; left-- > 1;) {
		struct deferred_fault last = faults[0];

		faults[0] = faults[left];
		faults[left] = last;
		sink(faults, 0, left);
	}
}

/* Whether what a page is copied from can be read without waiting. */
static bool is_here(const struct uffd_range *range, const struct uffd_file *file,
		    uint64_t address)
{
	if (file)
		return uffd_file_is_cached(file, address - file->address, range->page_size);
	return is_mapped_here(range->space, address, range->page_size);
}

bool may_block(struct uffd_range *range, uint64_t page, enum uffd_fault_kind kind)
{
	const struct uffd_content *content = range->content;
	uint64_t offset = content_offset(range, page);
	struct uffd_stretch stretch;

	if (kind == UFFD_KIND_WP)
		return preserves(range);
	if (atomic_load(state_of(range, page)) != UFFD_PAGE_ABSENT)
		return false;
	if (uffd_content_is_tail(content, offset))
		return true;
	if (content->overlay) {
		stretch = uffd_overlay_stretch(content->overlay, offset, range->page_size);
		return stretch.kind == UFFD_STRETCH_MIXED ||
		       (stretch.kind == UFFD_STRETCH_BYTES &&
			!is_here(range, stretch.file, stretch.address));
	}
	if (content->kind != UFFD_SOURCE_FILE && content->kind != UFFD_SOURCE_MEMORY)
		return false;
	return !is_here(range, content->kind == UFFD_SOURCE_FILE ? &content->file : NULL,
			content->address + offset);
}
