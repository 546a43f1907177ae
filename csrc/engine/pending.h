/* SPDX-License-Identifier: MIT */
/* Faults to retry.  For the leader. */
#ifndef UFFD_ENGINE_PENDING_H
#define UFFD_ENGINE_PENDING_H

#include "core.h"

/* Room for so many faults, of which those in the list are kept; false: out of memory. */
bool fault_list_grow(struct fault_list *list, size_t capacity);
void remember_fault(struct fault_list *list, const struct deferred_fault *fault);
static inline void defer_fault(struct uffd_engine *engine, const struct deferred_fault *fault)
{
	remember_fault(&engine->deferred, fault);
}
void forget_faults(struct fault_list *list, const struct uffd_space *space);
void forget_faults_in(struct fault_list *list, const struct uffd_space *space, uint64_t start,
		      uint64_t end);

#endif /* UFFD_ENGINE_PENDING_H */
