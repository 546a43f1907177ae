/* SPDX-License-Identifier: MIT */
/* Waiting while ranges are taken out. */
#ifndef UFFD_ENGINE_PATIENCE_H
#define UFFD_ENGINE_PATIENCE_H

#include "core.h"

/* Limits how long taking ranges out may wait for other threads, all waits together. */
struct patience {
	struct uffd_engine *engine;
	int64_t left_ns;	/* not used by the end: see end.patience_ns */
	bool is_gentle;		/* at the limit give up; poison no page in flight */
	unsigned int attempt;
};

/* Wait a little; false: the limit is reached. */
bool wait_on(struct patience *patience);
/* Between two pieces of work. */
void rest(struct patience *patience);

#endif /* UFFD_ENGINE_PATIENCE_H */
