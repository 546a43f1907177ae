// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/prctl.h>

#include "base/clock.h"
#include "base/page.h"
#include "snapshot/answering.h"
#include "snapshot/pages.h"
#include "uffd_shim.h"

#define BATCH 64u /* messages */
#define IDLE_MS 20
#define BUSY_MS 5 /* looks at the guard and the disk */
#define LATE_MS 1 /* at a limit of the rate */

/* End the protection, and with it the snapshot. */
static void end(struct uffd_saver *saver, int error)
{
	if (saver->stats.error)
		return;
	saver->stats.error = error;
	uffd_guard_lift(&saver->guard, saver->options.uffd);
	pthread_cond_broadcast(&saver->changed);
}

/* Whether the snapshot has ended; end it if a page could not be saved. */
static bool is_ended(struct uffd_saver *saver)
{
	if (saver->saving.error)
		end(saver, saver->saving.error);
	return saver->stats.error;
}

bool uffd_saver_owes(const struct uffd_saver *saver)
{
	return saver->saves && (saver->saving.owed.left || atomic_load(&saver->sweep.works));
}

/* Before the instant: what is owed tells the rest. */
static void note(struct uffd_saver *saver, uint64_t start, uint64_t finish, uint64_t kind)
{
	if (!saver->saves && uffd_pages_note(&saver->noted, start, finish, kind))
		end(saver, -ENOMEM);
}

static void resolve_fault(struct uffd_saver *saver, uint64_t address)
{
	uint64_t at = address / BASE_PAGE * BASE_PAGE, pages = 1;

	if (saver->saves) {
		pages = uffd_saving_around(&saver->saving, &at);
	} else {
		saver->stats.before++;
		note(saver, at, at + BASE_PAGE, 0);
	}
	if (is_ended(saver))
		return;
	/*
	 * An error wakes nobody: the layout is changing, or other memory is there by now, which is not
	 * registered.  A woken thread faults again if it still has to.
	 */
	if (!pages || uffd_shim_writeprotect(saver->options.uffd, at, pages * BASE_PAGE, 0))
		uffd_shim_wake(saver->options.uffd, at, (pages ? pages : 1) * BASE_PAGE);
}

static void apply(struct uffd_saver *saver, const struct uffd_msg *message)
{
	uint64_t from = message->arg.remap.from, to = message->arg.remap.to;
	uint64_t start = message->arg.remove.start, finish = message->arg.remove.end;

	saver->saving.changes++;
	if (message->event == UFFD_EVENT_REMAP) {
		uint64_t length = message->arg.remap.len;

		if (saver->saves) {
			/* Unmapped before: its message may come later. */
			uffd_saving_lose(&saver->saving, to, to + length);
			if (uffd_owed_move(&saver->saving.owed, from, to, length))
				end(saver, -ENOMEM);
		}
		note(saver, from, from + length, UFFD_SAVER_CHANGED);
		note(saver, to, to + length, UFFD_SAVER_CHANGED);
	} else if (message->event == UFFD_EVENT_REMOVE || message->event == UFFD_EVENT_UNMAP) {
		bool is_gone = message->event == UFFD_EVENT_UNMAP;

		if (saver->saves && !is_gone)
			uffd_saving_before_drop(&saver->saving, start, finish);
		if (saver->saves && is_gone) {
			uffd_saving_lose(&saver->saving, start, finish);
			if (uffd_owed_remove(&saver->saving.owed, start, finish))
				end(saver, -ENOMEM);
		}
		note(saver, start, finish, UFFD_SAVER_CHANGED);
	}
}

static void answer_one(struct uffd_saver *saver, const struct uffd_msg *message, uint64_t began)
{
	bool is_fault = message->event == UFFD_EVENT_PAGEFAULT;
	uint64_t waited;

	/*
	 * Nobody waits for an answer then: whoever waited at the end was woken, and memory that is not
	 * registered any more has no new faults.
	 */
	if (is_ended(saver))
		return;
	if (is_fault)
		resolve_fault(saver, message->arg.pagefault.address);
	else
		apply(saver, message);
	atomic_fetch_add(&saver->guard.shared->beat, 1);
	waited = uffd_now_ns() - began;
	if (is_fault && saver->saves && waited > saver->stats.longest_ns)
		saver->stats.longest_ns = waited;
}

bool uffd_saver_answer(struct uffd_saver *saver)
{
	struct uffd_guarded *guarded = saver->guard.shared;
	struct uffd_msg messages[BATCH];
	uint64_t began, count;
	int64_t n;

	atomic_store(&guarded->busy, 1);
	n = uffd_shim_read(saver->options.uffd, messages, sizeof(messages));
	began = uffd_now_ns();
	count = n > 0 ? (uint64_t)n / sizeof(*messages) : 0;
	/* The kernel has faults first, also those of memory that has moved before. */
	for (uint64_t i = 0; i < count; i++)
		if (messages[i].event != UFFD_EVENT_PAGEFAULT)
			answer_one(saver, &messages[i], began);
	for (uint64_t i = 0; i < count; i++)
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			answer_one(saver, &messages[i], began);
	atomic_fetch_add(&guarded->beat, 1);
	atomic_store(&guarded->busy, 0);
	return count;
}

static void check_others(struct uffd_saver *saver)
{
	int error = uffd_ring_error(saver->saving.ring, 0);

	if (!is_ended(saver) && atomic_load(&saver->guard.shared->ended))
		end(saver, -ETIMEDOUT);
	else if (error)
		end(saver, error);
	if (saver->saves && !uffd_saver_owes(saver))
		pthread_cond_broadcast(&saver->changed);
}

static bool answer(void *saver)
{
	return uffd_saver_answer(saver);
}

/* Returns how long to wait for messages, in milliseconds. */
static int sweep(struct uffd_saver *saver)
{
	int ret = 0;

	if (!is_ended(saver))
		ret = uffd_sweep_go_on(&saver->sweep, answer, saver);
	if (ret < 0)
		end(saver, ret);
	if (!uffd_saver_owes(saver) || is_ended(saver))
		return IDLE_MS;
	return uffd_sweep_is_late(&saver->sweep) ? LATE_MS : BUSY_MS;
}

void *uffd_saver_run(void *argument)
{
	struct uffd_saver *saver = argument;

	prctl(PR_SET_NAME, "uffd-save");
	for (;;) {
		struct pollfd ready[] = {
			{ .fd = saver->options.uffd, .events = POLLIN },
			{ .fd = saver->sweep.said_fd, .events = POLLIN },
		};
		bool busy, stop;
		int wait_ms;

		for (unsigned int i = 0; atomic_load(&saver->callers); i++)
			uffd_back_off(i);
		pthread_mutex_lock(&saver->lock);
		busy = uffd_saver_answer(saver);
		wait_ms = sweep(saver);
		check_others(saver);
		stop = saver->stop;
		pthread_mutex_unlock(&saver->lock);
		if (stop)
			return NULL;
		if (!busy)
			poll(ready, 2, wait_ms);
	}
}
