/* SPDX-License-Identifier: MIT */
/* Register a range, look for pages that are present, and open it: only then is it served. */
#ifndef UFFD_ENGINE_OPEN_H
#define UFFD_ENGINE_OPEN_H

#include "core.h"

/* What to do about pages that are present once the range is registered. */
enum uffd_present {
	UFFD_PRESENT_ANY,	/* nothing: they get no content */
	UFFD_PRESENT_REFUSE,	/* -EEXIST */
	UFFD_PRESENT_KEEP,	/* note them in the states */
	UFFD_PRESENT_DROP,	/* drop all pages; memory of this process only */
};

enum uffd_open_step {
	UFFD_OPEN_REGISTER,
	UFFD_OPEN_LOOK,
	UFFD_OPEN_DROP,
	UFFD_OPEN_POISON,
};

struct uffd_opening {
	uint32_t present;	/* enum uffd_present */
	int32_t pagemap_fd;	/* the owner's page table, for REFUSE; -1: the space's */
	uint64_t needed;	/* bits of ioctls that the range must support; else -EOPNOTSUPP */
	uint64_t before;	/* modes for which all of it is registered already; else 0 */
	uint32_t stays_registered; /* after an error as well */
	uint32_t reads_events;	/* the engine runs, and reads the event of a drop */
	const uint64_t *poison;	/* offsets, (start, end) each: pages to poison first */
	uint64_t poison_count;
	/* Results: */
	uint64_t ioctls;	/* 0: it is not registered */
	uint64_t supported;	/* the same, also after an error */
	uint64_t present_at;	/* the first page that is present, of -EEXIST */
	uint32_t step;		/* enum uffd_open_step: what has failed */
};

/*
 * Begin to serve a range that uffd_engine_add() has put in.  Until it is open, threads that
 * touch it wait as those in memory that is not served, and no page of it is filled.  So each
 * page that is present after the registration was touched before it, and would keep what it
 * holds.
 *
 * All of it is one call, since the thread that waits may hold the GIL.  After an error the
 * range is still closed, its memory is registered as it was before, and nobody waits in it.
 * -EAGAIN: to DROP without an engine that reads the events, other threads were too fast.
 */
int uffd_engine_open(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		     struct uffd_opening *opening);

/* Memory of this process that the engine of a helper process is to serve. */
struct uffd_dropping {
	int32_t fd;
	uint32_t shared;
	uint64_t start;
	uint64_t length;
	uint64_t mode;
};

/*
 * Register memory, drop all of it, and send the message that has the helper process open it: by
 * one call, as above.
 */
int uffd_register_dropped(const struct uffd_dropping *dropping, int sock, const void *message,
			  uint64_t size);

/* Open a range that others register: its ioctls. */
int uffd_engine_set_ioctls(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			   uint64_t ioctls);

#endif /* UFFD_ENGINE_OPEN_H */
