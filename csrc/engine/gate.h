/* SPDX-License-Identifier: MIT */
/*
 * The gate keeps content from landing in a page that was just removed, see
 * `struct uffd_engine`.  Spaces without layout events have none.
 */
#ifndef UFFD_ENGINE_GATE_H
#define UFFD_ENGINE_GATE_H

#include "core.h"

static inline bool has_gate(const struct uffd_space *space)
{
	return space->layout_events && !(ends(space->engine) && space->engine->end.ignores_gate);
}

static inline void gate_enter(struct uffd_space *space)
{
	if (has_gate(space))
		pthread_rwlock_rdlock(&space->engine->gate);
}

/*
 * Whether a thread waits to close it, and with it every fault that nobody has read yet: a thread
 * inside that has much to fill should leave, and enter again.
 */
static inline bool gate_is_wanted(const struct uffd_space *space)
{
	return atomic_load_explicit(&space->engine->gate_wanted, memory_order_relaxed);
}

/*
 * A source may block a thread inside.  gate_try_close() waits some milliseconds,
 * gate_close() until the engine stops; false: not closed.
 */
bool gate_try_close(struct uffd_space *space);
bool gate_close(struct uffd_space *space);

static inline void gate_leave(struct uffd_space *space)
{
	if (has_gate(space))
		pthread_rwlock_unlock(&space->engine->gate);
}

#endif /* UFFD_ENGINE_GATE_H */
