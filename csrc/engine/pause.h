/* SPDX-License-Identifier: MIT */
/*
 * Pausing: faults wait, and nothing that was asked for is put in place, until the pause is
 * over.  What the program itself asks for (populate, fill, protect, preserve) is done.
 */
#ifndef UFFD_ENGINE_PAUSE_H
#define UFFD_ENGINE_PAUSE_H

#include "core.h"

/*
 * Pause for at most `limit_ns`.  Returns when no fault is being resolved.  -EBUSY: paused
 * already; -ETIMEDOUT: a thread is still at a page, and the pause is over.
 */
int uffd_engine_pause(struct uffd_engine *engine, uint64_t limit_ns, uint64_t *token_ret);
/* -ETIME: the pause was over before; -EINVAL: this engine did not begin it. */
int uffd_engine_resume(struct uffd_engine *engine, uint64_t token);

bool pause_is_over(struct uffd_engine *engine);

/* Ask this after begin_work(), or with a hold, so that uffd_engine_pause() waits for you. */
static inline bool is_paused(struct uffd_engine *engine)
{
	return __builtin_expect(atomic_load(&engine->pause.until_ns) != 0, 0) &&
	       !pause_is_over(engine);
}

/* For a thread outside that wants to put pages in place: wait; then ask again, inside. */
void await_resumption(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_PAUSE_H */
