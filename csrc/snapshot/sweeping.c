// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/gentle.h"
#include "base/page.h"
#include "base/threads.h"
#include "snapshot/pages.h"
#include "snapshot/sweeping.h"
#include "uffd_shim.h"

_Static_assert(UFFD_SWEEP_PAGES <= UFFD_PAGES_MOST, "pages of a step");

/* The process may begin to swap: steps between two looks. */
#define LOOK_STEPS 64u
#define HUGE_PAGE (2ull << 20)

/* In the thread */

static int write_pages(const struct uffd_sweep *sweep)
{
	const struct uffd_sweep_step *step = &sweep->written;
	const char *from = sweep->memory;
	int ret = 0;

	for (uint64_t i = 0, stop; !ret && i < step->pages; i = stop) {
		for (stop = i; stop < step->pages && sweep->mine[stop]; stop++)
			;
		if (stop > i)
			ret = uffd_ring_write(sweep->fd, from + i * BASE_PAGE, stop - i,
					      step->offset + i * BASE_PAGE, step->states + i);
		else
			stop++;
	}
	return ret;
}

static int read_pages(struct uffd_sweep *sweep)
{
	const struct uffd_saving *saving = sweep->saving;
	const struct uffd_sweep_step *step = &sweep->read;
	uint64_t good = 0;
	bool is_read;
	int ret;

	uffd_cold_note(&sweep->cold, step->address, step->address + step->pages * BASE_PAGE);
	is_read = !uffd_pages_read(saving->pid, saving->mem_fd, step->address, step->pages,
				   sweep->memory);
	uffd_cold_again(&sweep->cold);
	ret = uffd_pages_protected(saving->pagemap_fd, step->address, step->pages, &good);
	sweep->is_good = is_read && good == step->pages;
	return ret;
}

static void *run(void *argument)
{
	struct uffd_sweep *sweep = argument;

	prctl(PR_SET_NAME, "uffd-sweep");
	uffd_be_gentle();
	for (unsigned int steps = 0;; steps++) {
		eventfd_t value;

		if (steps % LOOK_STEPS == 0) {
			uffd_cold_close(&sweep->cold);
			uffd_cold_open(&sweep->cold, sweep->saving->pid);
		}
		if (eventfd_read(sweep->told_fd, &value))
			continue; /* no signal is let in, but a debugger may have been here */
		if (sweep->stop)
			break;
		sweep->error = write_pages(sweep);
		if (!sweep->error && sweep->read.pages)
			sweep->error = read_pages(sweep);
		atomic_store(&sweep->works, false);
		eventfd_write(sweep->said_fd, 1);
	}
	uffd_cold_close(&sweep->cold);
	return NULL;
}

/* In the thread that answers */

static bool is_due(const struct uffd_sweep *sweep)
{
	double seconds = (double)(uffd_now_ns() - sweep->began_ns) / 1e9;

	return !sweep->rate ||
	       (double)(sweep->saving->swept * BASE_PAGE) <= seconds * (double)sweep->rate;
}

/* Lift the protection of what is saved, of whole huge pages only: less would split them. */
static void lift(struct uffd_sweep *sweep, bool rest)
{
	uint64_t start = sweep->lifted, finish = sweep->saved;

	if (!rest)
		finish &= ~(HUGE_PAGE - 1);
	if (finish <= start)
		return;
	uffd_shim_writeprotect(sweep->saving->uffd, start, finish - start, 0);
	sweep->lifted = finish;
}

static void note_saved(struct uffd_sweep *sweep, const struct uffd_sweep_step *step)
{
	if (step->address != sweep->saved) {
		lift(sweep, true);
		sweep->lifted = step->address;
	}
	sweep->saved = step->address + step->pages * BASE_PAGE;
	lift(sweep, false);
}

/* Save what was read, except pages that a fault has saved meanwhile. */
static void take(struct uffd_sweep *sweep)
{
	const struct uffd_sweep_step *step = &sweep->read;

	for (uint64_t i = 0; i < step->pages; i++) {
		sweep->mine[i] = atomic_load(&step->states[i]) == UFFD_OWED_YES;
		if (!sweep->mine[i])
			continue;
		uffd_owed_settle(&sweep->saving->owed, step->piece, step->address + i * BASE_PAGE,
				 UFFD_OWED_TAKEN);
		sweep->saving->swept++;
	}
	note_saved(sweep, step);
	sweep->written = *step;
}

/* Whether a fault has saved none of its pages meanwhile. */
static bool is_owed(const struct uffd_sweep_step *step)
{
	for (uint64_t i = 0; i < step->pages; i++)
		if (atomic_load(&step->states[i]) != UFFD_OWED_YES)
			return false;
	return true;
}

static void take_each(struct uffd_sweep *sweep)
{
	const struct uffd_sweep_step *step = &sweep->read;

	for (uint64_t i = 0; i < step->pages && !sweep->saving->error; i++)
		uffd_saving_one(sweep->saving, step->piece, step->address + i * BASE_PAGE);
	note_saved(sweep, step);
}

static void use_read(struct uffd_sweep *sweep, bool (*answer)(void *), void *argument)
{
	/* Messages first: they tell what has become of the pages. */
	if (sweep->changes != sweep->saving->changes)
		return;
	if ((!sweep->is_good || uffd_saving_is_changing(sweep->saving)) &&
	    (answer(argument) || uffd_saving_is_changing(sweep->saving)))
		return;
	if (sweep->changes != sweep->saving->changes || sweep->saving->error)
		return;
	if (sweep->is_good)
		take(sweep);
	else if (is_owed(&sweep->read))
		take_each(sweep);
	else
		return; /* read the others again: all at once is faster than each alone */
	sweep->from = sweep->read.address + sweep->read.pages * BASE_PAGE;
}

/* Find the next owed pages; behind the last begin at the first again, as some have moved. */
static void find_next(struct uffd_sweep *sweep)
{
	struct uffd_sweep_step *step = &sweep->read;
	struct uffd_owed *owed = &sweep->saving->owed;

	for (unsigned int turn = 0; turn < 2 && !step->pages; turn++) {
		step->pages = uffd_owed_next(owed, sweep->from, UINT64_MAX, UFFD_SWEEP_PAGES,
					     &step->piece, &step->address);
		if (!step->pages)
			sweep->from = 0;
	}
	if (!step->pages)
		return;
	step->offset = step->piece->offset + (step->address - step->piece->start);
	step->states = step->piece->states + (step->address - step->piece->start) / BASE_PAGE;
	if (sweep->changes != sweep->saving->changes)
		sweep->lifted = sweep->saved; /* it may be elsewhere; a write to it is let through */
	sweep->changes = sweep->saving->changes;
}

int uffd_sweep_go_on(struct uffd_sweep *sweep, bool (*answer)(void *), void *argument)
{
	eventfd_t value;

	/*
	 * Read before looking at `works`: what the sweeper says after that is kept for the
	 * next time.
	 */
	eventfd_read(sweep->said_fd, &value);
	if (atomic_load(&sweep->works) || !sweep->began_ns)
		return 0;
	if (sweep->error)
		return sweep->error;
	sweep->written.pages = 0;
	if (sweep->read.pages)
		use_read(sweep, answer, argument);
	sweep->read.pages = 0;
	if (sweep->saving->owed.left && is_due(sweep))
		find_next(sweep);
	if (!sweep->saving->owed.left && sweep->changes == sweep->saving->changes)
		lift(sweep, true);
	if (!sweep->written.pages && !sweep->read.pages)
		return 0;
	atomic_store(&sweep->works, true);
	eventfd_write(sweep->told_fd, 1);
	return 1;
}

bool uffd_sweep_is_late(const struct uffd_sweep *sweep)
{
	return !atomic_load(&sweep->works) && sweep->saving->owed.left;
}

int uffd_sweep_start(struct uffd_sweep *sweep, struct uffd_saving *saving, int fd, uint64_t rate)
{
	int ret;

	*sweep = (struct uffd_sweep){ .saving = saving, .fd = fd, .rate = rate,
				      .cold = { .pidfd = -1, .pagemap_fd = -1 } };
	sweep->said_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	sweep->told_fd = eventfd(0, EFD_CLOEXEC);
	ret = sweep->said_fd < 0 || sweep->told_fd < 0 ? -errno : 0;
	sweep->memory = uffd_ring_memory(UFFD_SWEEP_PAGES);
	if (!ret && !sweep->memory)
		ret = -ENOMEM;
	if (!ret)
		ret = uffd_thread_start(&sweep->thread, NULL, run, sweep);
	if (ret) {
		sweep->stop = true;
		uffd_sweep_stop(sweep);
	}
	return ret;
}

void uffd_sweep_stop(struct uffd_sweep *sweep)
{
	if (!sweep->stop) {
		while (atomic_load(&sweep->works)) /* wait until it has read what it was told */
			uffd_back_off(16);
		sweep->stop = true;
		eventfd_write(sweep->told_fd, 1);
		pthread_join(sweep->thread, NULL);
	}
	if (sweep->said_fd >= 0)
		close(sweep->said_fd);
	if (sweep->told_fd >= 0)
		close(sweep->told_fd);
	if (sweep->memory)
		munmap(sweep->memory, UFFD_SWEEP_PAGES * BASE_PAGE);
}
