/* SPDX-License-Identifier: MIT */
/*
 * Reports to the keeper: another process that outlives this one if it is killed.
 *
 * It holds copies of the descriptors that only we have (forks), knows where every
 * piece of memory is by now, and can start a successor that goes on from there.
 * The pages' states lie in files that both have, and so does what was read from the
 * descriptors and not applied.
 *
 * A fork's descriptor comes into being in the process that reads the event.  So that
 * it outlives that process from the first instant, a third one, the holder, shares
 * the worker's table of descriptors and does nothing else.
 */
#ifndef UFFD_KEEPER_H
#define UFFD_KEEPER_H

#include <stdint.h>

enum uffd_report_kind {
	UFFD_REPORT_ADDED,	/* one piece */
	UFFD_REPORT_DROPPED,	/* every piece of `id` in the space */
	UFFD_REPORT_PIECES,	/* what the space consists of now */
	UFFD_REPORT_FORK,	/* the same of a new space; its userfaultfd, and its states file if any */
	UFFD_REPORT_GONE,	/* the space */
};

/* One on the stream; `count` pieces follow, descriptors come with its first byte. */
struct uffd_report {
	uint32_t kind;
	uint32_t space;
	uint64_t id;		/* FORK: its layout events, UFFD_FEATURE_EVENT_* */
	uint64_t count;
	uint64_t sequence;	/* PIECES, FORK: number of the event that changed it */
};

struct uffd_report_piece {
	uint64_t id;		/* 0: no piece, but an unmapping whose event is still to come */
	uint64_t start;
	uint64_t end;
	uint64_t origin;
	uint64_t states_offset;	/* in the space's states file; unused where forks share them */
};

/* For the keeper's child: be killed when the keeper ends; -ESRCH: it has. */
int uffd_keeper_follow_parent(int32_t parent);

/*
 * For the keeper's child, before anything else: make the holder, a child of the
 * keeper, and note it in what outlives us.  It shuts the sockets when we end.
 */
int uffd_keeper_hold_descriptors(void *shared, int32_t keeper, const int32_t *sockets,
				 uint32_t count);
/*
 * For the keeper, when its child has been killed: take over the descriptor of the
 * next fork that was read and not applied.  Returns it and moves `position` behind
 * it; -ENOENT: there is none; else it cannot be had.
 */
int uffd_keeper_rescue_fork(void *shared, uint32_t *position);
/* End the holder. */
void uffd_keeper_release_holder(void *shared);

#endif /* UFFD_KEEPER_H */
