// SPDX-License-Identifier: MIT
/*
 * Waiting while ranges are taken out: for other threads, up to a limit.  A thread that
 * ends the engine also leads it while it waits.
 */
#define _GNU_SOURCE
#include "left.h"
#include "patience.h"
#include "step.h"
#include "stray.h"
#include "base/clock.h"

/* Deduct the time waited; false: the limit is reached. */
static bool spend(struct patience *patience, uint64_t since_ns)
{
	int64_t spent = (int64_t)(uffd_now_ns() - since_ns);

	if (ends(patience->engine))
		return atomic_fetch_sub(&patience->engine->end.patience_ns, spent) > spent;
	patience->left_ns -= spent;
	/* Once the end is over, what it left in place stays. */
	return patience->left_ns > 0 && !atomic_load(&patience->engine->end.over);
}

static void lead_a_step(struct uffd_engine *engine)
{
	uint32_t handled;

	if (!engine->end.leads)
		return;
	uffd_engine_step(engine, &handled);
	if (atomic_load(&engine->vacated))
		settle_all_vacated(engine);
	if (engine->strays.count)
		refuse_strays(engine, false);
	if (engine->deferred.count)
		retry_deferred(engine);
}

bool wait_on(struct patience *patience)
{
	uint64_t began = uffd_now_ns();

	if (ends(patience->engine))
		lead_a_step(patience->engine);
	uffd_back_off(patience->attempt++);
	return spend(patience, began);
}

void rest(struct patience *patience)
{
	patience->attempt = 0;
	if (!ends(patience->engine))
		return;
	atomic_fetch_add(&patience->engine->end.progress, 1);
	lead_a_step(patience->engine);
}
