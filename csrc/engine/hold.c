// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <sched.h>
#include <stddef.h>

#include "hold.h"
#include "table.h"

void uffd_hold_move(struct uffd_hold *hold, uint64_t start, uint64_t end)
{
	atomic_store_explicit(&hold->start, start, memory_order_relaxed);
	atomic_store_explicit(&hold->end, end, memory_order_relaxed);
}

struct uffd_hold *uffd_hold_take(struct uffd_holds *holds, const struct uffd_range *range,
				 uint64_t start, uint64_t end, uint32_t thread_id)
{
	int cpu = sched_getcpu();
	unsigned int first = cpu < 0 ? 0 : (unsigned int)cpu;

	for (unsigned int i = 0; i < UFFD_HOLDS; i++) {
		struct uffd_hold *hold = &holds->all[(first + i) % UFFD_HOLDS];
		const struct uffd_range *nobody = NULL;

		if (!atomic_compare_exchange_strong(&hold->range, &nobody, range))
			continue;
		atomic_store_explicit(&hold->id, range->id, memory_order_relaxed);
		uffd_hold_move(hold, start, end);
		atomic_store_explicit(&hold->thread_id, thread_id, memory_order_relaxed);
		return hold;
	}
	return NULL;
}

void uffd_hold_release(struct uffd_hold *hold)
{
	atomic_store_explicit(&hold->is_call, false, memory_order_relaxed);
	atomic_store_explicit(&hold->range, NULL, memory_order_release);
}

bool uffd_hold_is_on(struct uffd_holds *holds, const struct uffd_range *range)
{
	for (unsigned int i = 0; i < UFFD_HOLDS; i++)
		if (atomic_load(&holds->all[i].range) == range)
			return true;
	return false;
}

bool uffd_hold_any(struct uffd_holds *holds)
{
	for (unsigned int i = 0; i < UFFD_HOLDS; i++)
		if (atomic_load(&holds->all[i].range))
			return true;
	return false;
}

bool uffd_hold_any_fault(struct uffd_holds *holds)
{
	for (unsigned int i = 0; i < UFFD_HOLDS; i++)
		if (atomic_load(&holds->all[i].range) && !atomic_load(&holds->all[i].is_call))
			return true;
	return false;
}
