// SPDX-License-Identifier: MIT
/* Unmappings whose events are still to come. */
#define _GNU_SOURCE
#include "alloc.h"
#include "owed.h"

void owe(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct owed_unmap *owed;

	if (start >= end || !(space->event_features & UFFD_FEATURE_EVENT_UNMAP))
		return;
	owed = uffd_alloc(sizeof(*owed));
	if (!owed)
		return;
	*owed = (struct owed_unmap){ space->owed, start, end };
	space->owed = owed;
}

struct owed_unmap *pay(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct owed_unmap **link = &space->owed, *owed;

	while ((owed = *link) && (owed->end <= start || owed->start >= end))
		link = &owed->next;
	if (!owed)
		return NULL;
	*link = owed->next;
	owe(space, owed->start, lower(owed->end, start));
	owe(space, higher(owed->start, end), owed->end);
	return owed;
}

void forget_owed(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct owed_unmap *owed;

	while ((owed = pay(space, start, end)))
		uffd_free(owed);
}
