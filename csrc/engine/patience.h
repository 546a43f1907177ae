/* SPDX-License-Identifier: MIT */
/* Waiting while ranges are taken out. */
#ifndef UFFD_ENGINE_PATIENCE_H
#define UFFD_ENGINE_PATIENCE_H

#include "core.h"

/* How long taking ranges out may wait for others, all waits together. */
struct patience {
	struct uffd_engine *engine;
	int64_t left_ns;	/* not for the end: that has the engine's */
	bool is_gentle;		/* then give up, and poison no page in flight */
	unsigned int attempt;
};

/* Wait a little; false: it has been long enough. */
bool wait_on(struct patience *patience);
/* Between two pieces of work. */
void rest(struct patience *patience);

#endif /* UFFD_ENGINE_PATIENCE_H */
