/* SPDX-License-Identifier: MIT */
/*
 * Reports to the keeper, another process that outlives this one if it is killed: the
 * address of every piece, and the descriptors that only this process has.  Without a
 * keeper they do nothing.  See successor.h for their use.
 */
#ifndef UFFD_ENGINE_REPORT_H
#define UFFD_ENGINE_REPORT_H

#include "core.h"

enum uffd_report_kind {
	UFFD_REPORT_ADDED,	/* one piece */
	UFFD_REPORT_DROPPED,	/* every piece of `id` in the space */
	UFFD_REPORT_PIECES,	/* all pieces of the space now */
	UFFD_REPORT_FORK,	/* the same for a new space, with its userfaultfd and states file */
	UFFD_REPORT_GONE,	/* the space is gone */
};

/* A message on the stream; `count` pieces follow; descriptors come with its first byte. */
struct uffd_report {
	uint32_t kind;
	uint32_t space;
	uint64_t id;		/* FORK: its layout events, UFFD_FEATURE_EVENT_* */
	uint64_t count;
	uint64_t sequence;	/* PIECES, FORK: number of the layout event */
};

struct uffd_report_piece {
	uint64_t id;		/* 0: an expected unmapping instead of a piece */
	uint64_t start;
	uint64_t end;
	uint64_t origin;
	uint64_t states_offset;	/* in the space's states file; unused if forks share states */
	uint64_t is_left;
};

void report_added(const struct uffd_range *range);
void report_dropped(struct uffd_engine *engine, uint32_t space, uint64_t id);
void report_pieces(struct uffd_space *space);
void report_fork(struct uffd_space *child, int states_fd);
void report_gone(struct uffd_space *space);

/* Create a file for the states of a fork's pages; -1: none is needed, or it failed. */
int report_states_file(struct uffd_space *parent);

#endif /* UFFD_ENGINE_REPORT_H */
