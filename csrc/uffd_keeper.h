/* SPDX-License-Identifier: MIT */
/*
 * Reports to the keeper: another process that outlives this one if it is killed.
 *
 * It holds copies of the descriptors that only we have (forks), knows where every
 * piece of memory is by now, and can start a successor that goes on from there.
 * The pages' states lie in files that both have.
 */
#ifndef UFFD_KEEPER_H
#define UFFD_KEEPER_H

#include <stdint.h>

enum uffd_report_kind {
	UFFD_REPORT_ADDED,	/* one piece */
	UFFD_REPORT_DROPPED,	/* every piece of `id` in the space */
	UFFD_REPORT_PIECES,	/* what the space consists of now; with a states file or without */
	UFFD_REPORT_FORK,	/* a new space, and its userfaultfd */
	UFFD_REPORT_GONE,	/* the space */
};

/* One on the stream; `count` pieces follow, descriptors come with its first byte. */
struct uffd_report {
	uint32_t kind;
	uint32_t space;
	uint64_t id;		/* FORK: its layout events, UFFD_FEATURE_EVENT_* */
	uint64_t count;
};

struct uffd_report_piece {
	uint64_t id;
	uint64_t start;
	uint64_t end;
	uint64_t origin;
	uint64_t states_offset;	/* in the space's states file; unused where forks share them */
};

/* For the keeper's child: be killed when the keeper ends; -ESRCH: it has. */
int uffd_keeper_follow_parent(int32_t parent);

#endif /* UFFD_KEEPER_H */
