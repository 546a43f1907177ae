// SPDX-License-Identifier: MIT
/* Faults to retry. */
#define _GNU_SOURCE
#include <string.h>

#include "alloc.h"
#include "pending.h"
#include "stats.h"
#include "uffd_shim.h"

/* NULL: out of memory, and the old block is unchanged. */
static void *grow(void *block, size_t used, size_t size)
{
	void *larger = uffd_alloc(size);

	if (!larger)
		return NULL;
	if (used)
		memcpy(larger, block, used);
	uffd_free(block);
	return larger;
}

void remember_fault(struct fault_list *list, const struct deferred_fault *fault)
{
	for (size_t i = 0; i < list->count; i++)
		if (list->faults[i].space == fault->space &&
		    list->faults[i].address == fault->address &&
		    fault_kind(list->faults[i].flags) == fault_kind(fault->flags))
			return;
	if (list->count == list->capacity) {
		size_t capacity = list->capacity ? 2 * list->capacity : 64;
		struct deferred_fault *larger = grow(list->faults, list->count * sizeof(*larger),
						     capacity * sizeof(*larger));

		if (!larger) {
			/* Out of memory: wake the thread, so that the kernel sends it again. */
			uffd_shim_wake(fault->space->fd, fault->address & ~(BASE_PAGE - 1ull),
				       BASE_PAGE);
			return;
		}
		list->faults = larger;
		list->capacity = capacity;
	}
	list->faults[list->count++] = *fault;
}

void forget_faults_in(struct fault_list *list, const struct uffd_space *space, uint64_t start,
		      uint64_t end)
{
	size_t kept = 0;

	for (size_t i = 0; i < list->count; i++)
		if (list->faults[i].space != space || list->faults[i].address < start ||
		    list->faults[i].address >= end)
			list->faults[kept++] = list->faults[i];
	list->count = kept;
}

void forget_faults(struct fault_list *list, const struct uffd_space *space)
{
	forget_faults_in(list, space, 0, UINT64_MAX);
}
