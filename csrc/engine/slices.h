/* SPDX-License-Identifier: MIT */
/* Work on served pages from outside the loop. */
#ifndef UFFD_ENGINE_SLICES_H
#define UFFD_ENGINE_SLICES_H

#include "core.h"

/* Between open_access() and close_access() no piece goes away and the layout is fixed. */
struct access {
	struct uffd_space *space;
	unsigned int shard;
	uint32_t phase;
	struct uffd_hold *hold;
};

bool open_access(struct uffd_engine *engine, uint32_t number, struct access *access);
void close_access(struct access *access);
/* The same for a range, with one of its pieces; -ESRCH and -ENOENT open nothing. */
int open_piece(struct uffd_engine *engine, const struct uffd_range_ref *ref, struct access *access,
	       struct uffd_range **range_ret);
/*
 * Work on [offset, end) of a range in slices, with an access of its own for each.  `work`
 * returns how far it got; EAGAIN and ENOMEM are retried.  `reach` says which memory of
 * this process the next work will touch, and returns up to where.
 */
struct reach {
	struct uffd_content *content;
	uint64_t read, read_length;
	uint64_t write, write_length;
	uint64_t overlay_offset, overlay_length;	/* of the content, if it is an overlay */
	bool tail;		/* the page in which the source ends */
};

struct slices;

typedef uint64_t (*slice_work)(const struct slices *all, struct uffd_range *range, uint64_t at,
			       uint64_t end, int *error_ret, uint64_t *done_ret);
typedef uint64_t (*slice_reach)(const struct slices *all, struct uffd_range *range, uint64_t at,
				uint64_t end, struct reach *reach);

struct slices {
	struct uffd_engine *engine;
	struct uffd_range_ref ref;
	uint64_t offset, end;
	slice_work work;
	slice_reach reach;	/* NULL: the work touches nothing that may block */
	void *context;		/* for the work */
	uint32_t thread_id;	/* of the caller, if many calls share it; else 0 */
};

/* Only fault in what the work on all of it will touch. */
void fault_in_slices(const struct slices *all);
int do_slice(const struct slices *all, uint64_t *offset, uint64_t *done_ret);
/* `reached_ret`: the offset where the work stopped. */
int for_slices(const struct slices *all, uint64_t *done_ret, uint64_t *reached_ret);

#endif /* UFFD_ENGINE_SLICES_H */
