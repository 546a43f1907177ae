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

/*
 * Of the faults that are read together: the kernel looks at all waiting threads for each of these
 * calls, and each thread waits for all faults before the next one.
 */
#define MOST_WAKES 16u
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

/* Save a page before its first write, or note it; returns the pages that may be written now. */
static uint64_t let_through(struct uffd_saver *saver, uint64_t *address)
{
	if (saver->saves)
		return uffd_saving_around(&saver->saving, address);
	saver->stats.before++;
	note(saver, *address, *address + BASE_PAGE, 0);
	return 1;
}

static void note_waited(struct uffd_saver *saver)
{
	uint64_t waited = uffd_now_ns() - saver->saving.since_ns;

	saver->stats.wakes++;
	if (saver->saves && waited > saver->stats.longest_ns)
		saver->stats.longest_ns = waited;
}

static void resolve_faults(struct uffd_saver *saver)
{
	const uint64_t *faults = saver->unread.faults, count = saver->unread.faults_count;
	uint64_t each = (count + MOST_WAKES - 1) / MOST_WAKES; /* faults for a call that wakes */
	uint64_t mode = each > 1 ? UFFDIO_WRITEPROTECT_MODE_DONTWAKE : 0;
	uint64_t start = 0, end = 0, lifted = 0;
	bool sleeps = false;

	for (uint64_t i = 0; i < count; i++) {
		if (faults[i] >= lifted) { /* else saved with one before it */
			uint64_t at = faults[i], pages = let_through(saver, &at);

			if (is_ended(saver))
				return;
			start = end ? start : at;
			end = at + (pages ? pages : 1) * BASE_PAGE;
			/*
			 * An error wakes nobody: the layout is changing, or other memory is there by
			 * now, which is not registered.  A woken thread faults again if it has to.
			 */
			if (!pages || uffd_shim_writeprotect(saver->options.uffd, at,
							     pages * BASE_PAGE, mode))
				sleeps = true;
			else
				lifted = end;
		}
		if (!end || ((i + 1) % each && i + 1 < count))
			continue;
		if (mode || sleeps)
			uffd_shim_wake(saver->options.uffd, start, end - start);
		note_waited(saver);
		end = 0;
		sleeps = false;
	}
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

bool uffd_saver_answer(struct uffd_saver *saver)
{
	struct uffd_unread *unread = &saver->unread;
	struct uffd_guarded *guarded = saver->guard.shared;
	struct uffd_saving *saving = &saver->saving;
	uint64_t unread_ns;
	bool any;

	atomic_store(&guarded->busy, 1);
	/* While the thread sleeps, the first message wakes it. */
	saving->since_ns = saving->unread_ns > saver->slept_ns ? saving->unread_ns : saver->slept_ns;
	unread_ns = uffd_unread_take(unread, saver->options.uffd);
	if (unread_ns)
		saving->unread_ns = unread_ns;
	any = unread->faults_count || unread->others_count;
	/* The kernel has faults first, also those of memory that has moved before. */
	for (uint64_t i = 0; i < unread->others_count && !is_ended(saver); i++)
		apply(saver, &unread->others[i]);
	/*
	 * Nobody waits for an answer once it has ended: whoever waited was woken, and memory that is
	 * not registered any more has no new faults.
	 */
	if (!is_ended(saver))
		resolve_faults(saver);
	saving->since_ns = 0;
	if (any)
		uffd_saving_has_unread(saving);
	atomic_store(&guarded->answered_ns, saving->unread_ns);
	atomic_store(&guarded->busy, 0);
	return any;
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
	uint64_t slept_ns = 0;

	prctl(PR_SET_NAME, "uffd-save");
	for (;;) {
		struct pollfd ready[] = {
			{ .fd = saver->options.uffd, .events = POLLIN },
			{ .fd = saver->sweep.said_fd, .events = POLLIN },
		};
		bool idle, stop;
		int wait_ms;

		for (unsigned int i = 0; atomic_load(&saver->callers); i++)
			uffd_back_off(i);
		pthread_mutex_lock(&saver->lock);
		saver->slept_ns = slept_ns;
		idle = !uffd_saver_answer(saver);
		wait_ms = sweep(saver);
		check_others(saver);
		idle = idle && !uffd_saving_has_unread(&saver->saving);
		stop = saver->stop;
		pthread_mutex_unlock(&saver->lock);
		if (stop)
			return NULL;
		if (!idle)
			continue;
		poll(ready, 2, wait_ms);
		slept_ns = uffd_now_ns();
	}
}
