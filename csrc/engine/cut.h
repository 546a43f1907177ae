/* SPDX-License-Identifier: MIT */
/*
 * Cut a part out of a served piece.  All that this needs memory for happens in cut_begin(),
 * so that nothing of the piece is lost if there is none; cut_finish() cannot fail.
 */
#ifndef UFFD_ENGINE_CUT_H
#define UFFD_ENGINE_CUT_H

#include "core.h"

struct cut {
	struct uffd_range *range;
	struct uffd_range *rest[2];	/* what stays, in order */
	size_t count;
};

/* Prepare to take [from, stop) out of a piece; -ENOMEM: nothing has changed. */
int cut_begin(struct uffd_range *range, uint64_t from, uint64_t stop, struct cut *ret);
/* Put the rest in the place of the piece, in one step, and discard the piece. */
void cut_finish(struct cut *cut);
void cut_cancel(struct cut *cut);

#endif /* UFFD_ENGINE_CUT_H */
