// SPDX-License-Identifier: MIT
/*
 * Pausing.  A program that is stuck in a pause must not stop its own faults forever: the
 * pause has a limit, and the next thread that looks notices that it is over.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "hold.h"
#include "pause.h"
#include "stats.h"
#include "base/clock.h"

/*
 * How long to wait for work at once, under the lock of all who wait for it; in between, look
 * whether the engine ends.
 */
#define LOOK_NS	1000000

bool pause_is_over(struct uffd_engine *engine)
{
	uint64_t until = atomic_load(&engine->pause.until_ns);

	if (!until)
		return true;
	if (!atomic_load(&engine->end.began) && uffd_now_ns() < until)
		return false;
	/* Note when: requests have not been waited for during the pause. */
	atomic_store(&engine->pause.ended_ns, uffd_now_ns());
	atomic_compare_exchange_strong(&engine->pause.until_ns, &until, 0);
	return true;
}

/* Wait until every thread that looked before the pause began has left. */
static bool await_faults(struct uffd_engine *engine)
{
	unsigned int attempt = 0;

	while (!await_work_until(engine, uffd_now_ns() + LOOK_NS) ||
	       uffd_hold_any_fault(&engine->holds) ||
	       (engine->table && !uffd_table_is_quiet(engine->table))) {
		if (pause_is_over(engine))
			return false;
		uffd_back_off(attempt++);
	}
	return true;
}

int uffd_engine_pause(struct uffd_engine *engine, uint64_t limit_ns, uint64_t *token_ret)
{
	uint64_t until = uffd_now_ns() + limit_ns, nothing = 0;

	if (!pause_is_over(engine) ||
	    !atomic_compare_exchange_strong(&engine->pause.until_ns, &nothing, until))
		return -EBUSY;
	*token_ret = until;
	return await_faults(engine) ? 0 : -ETIMEDOUT;
}

int uffd_engine_resume(struct uffd_engine *engine, uint64_t token)
{
	atomic_store(&engine->pause.ended_ns, uffd_now_ns());
	if (!atomic_compare_exchange_strong(&engine->pause.until_ns, &token, 0))
		return -ETIME;
	kick_leader(engine);
	return uffd_now_ns() < token ? 0 : -ETIME;
}

void await_resumption(struct uffd_engine *engine)
{
	unsigned int attempt = 0;

	while (is_paused(engine))
		uffd_back_off(attempt++);
}
