// SPDX-License-Identifier: MIT
/* Faults to retry. */
#define _GNU_SOURCE
#include <string.h>

#include "alloc.h"
#include "pending.h"
#include "stats.h"
#include "uffd_shim.h"

bool fault_list_grow(struct fault_list *list, size_t capacity)
{
	struct deferred_fault *larger;

	if (capacity <= list->capacity)
		return true;
	larger = uffd_alloc(capacity * sizeof(*larger));
	if (!larger)
		return false;
	if (list->count)
		memcpy(larger, list->faults, list->count * sizeof(*larger));
	uffd_free(list->faults);
	list->faults = larger;
	list->capacity = capacity;
	return true;
}

void remember_fault(struct fault_list *list, const struct deferred_fault *fault)
{
	for (size_t i = 0; i < list->count; i++)
		if (list->faults[i].space == fault->space &&
		    list->faults[i].address == fault->address &&
		    fault_kind(list->faults[i].flags) == fault_kind(fault->flags))
			return;
	if (list->count == list->capacity &&
	    !fault_list_grow(list, list->capacity ? 2 * list->capacity : 64)) {
		/* Out of memory: wake the thread, so that the kernel sends it again. */
		uffd_shim_wake(fault->space->fd, fault->address & ~(BASE_PAGE - 1ull), BASE_PAGE);
		return;
	}
	list->faults[list->count] = *fault;
	list->faults[list->count++].late = NULL;
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
