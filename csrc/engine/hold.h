/* SPDX-License-Identifier: MIT */
/*
 * Ranges that threads are working on, outside the table.
 *
 * A source may block its reader forever: a file system that stops answering, memory
 * that another userfaultfd never fills.  In the kernel only SIGKILL ends that.  So a
 * thread that reads a source, or writes to the user's memory, first puts a hold on the
 * range and leaves the table.  A range that was taken out is freed when its last hold is
 * released; no thread waits for that.  While a hold lasts, ioctls on its pages may still
 * be under way.
 */
#ifndef UFFD_HOLD_H
#define UFFD_HOLD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct uffd_range;

#define UFFD_HOLDS 64

struct uffd_hold {
	_Alignas(64) _Atomic(const struct uffd_range *) range;	/* NULL: free */
	_Atomic uint64_t id;		/* of the range */
	_Atomic uint64_t start;		/* the pages */
	_Atomic uint64_t end;
	_Atomic uint32_t thread_id;
	_Atomic bool is_call;		/* of the program, and not for a fault */
};

struct uffd_holds {
	struct uffd_hold all[UFFD_HOLDS];
};

/*
 * For a reader of the table; NULL: all holds are in use, and the reader must stay
 * inside.  Async-signal-safe.
 */
struct uffd_hold *uffd_hold_take(struct uffd_holds *holds, const struct uffd_range *range,
				 uint64_t start, uint64_t end, uint32_t thread_id);
/* Move the hold to other pages of the range. */
void uffd_hold_move(struct uffd_hold *hold, uint64_t start, uint64_t end);
void uffd_hold_release(struct uffd_hold *hold);

/* For a range out of the table whose readers have left: whether a thread is at it. */
bool uffd_hold_is_on(struct uffd_holds *holds, const struct uffd_range *range);
bool uffd_hold_any(struct uffd_holds *holds);
bool uffd_hold_any_fault(struct uffd_holds *holds);

#endif /* UFFD_HOLD_H */
