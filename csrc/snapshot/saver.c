// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#include "base/clock.h"
#include "base/page.h"
#include "snapshot/guard.h"
#include "snapshot/pages.h"
#include "snapshot/saver.h"
#include "snapshot/saving.h"
#include "uffd_shim.h"

#define BATCH UFFD_PAGES_MOST /* messages, and pages of a step of the sweep */
#define IDLE_MS 20
#define BUSY_MS 1

struct uffd_saver {
	struct uffd_saver_options options;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct uffd_guard guard;
	struct uffd_saving saving;
	struct uffd_page_ranges noted;	/* in the order of the messages */
	uint64_t swept_to;
	uint64_t began_ns;
	struct uffd_saver_stats stats;
	/* Calls that wait for the lock: the thread, which has it nearly always, lets them. */
	_Atomic uint32_t callers;
	bool saves, stop;
};

static void lock(struct uffd_saver *saver)
{
	atomic_fetch_add(&saver->callers, 1);
	pthread_mutex_lock(&saver->lock);
	atomic_fetch_sub(&saver->callers, 1);
}

/* The protection ends, and with it the snapshot. */
static void end(struct uffd_saver *saver, int error)
{
	if (saver->stats.error)
		return;
	saver->stats.error = error;
	uffd_guard_lift(saver->guard.shared, saver->options.uffd);
	pthread_cond_broadcast(&saver->changed);
}

/* Also ends it if a page could not be saved. */
static bool is_ended(struct uffd_saver *saver)
{
	if (saver->saving.error)
		end(saver, saver->saving.error);
	return saver->stats.error;
}

static void note(struct uffd_saver *saver, uint64_t start, uint64_t finish, uint64_t kind)
{
	if (uffd_pages_note(&saver->noted, start, finish, kind))
		end(saver, -ENOMEM);
}

/* While the layout changes the pages stay protected: who is woken faults again. */
static void unprotect(struct uffd_saver *saver, uint64_t start, uint64_t length)
{
	if (uffd_shim_writeprotect(saver->options.uffd, start, length, 0) == -EAGAIN)
		uffd_shim_wake(saver->options.uffd, start, length);
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
	if (!is_ended(saver))
		unprotect(saver, at, pages * BASE_PAGE);
}

static void apply(struct uffd_saver *saver, const struct uffd_msg *message)
{
	uint64_t from = message->arg.remap.from, to = message->arg.remap.to;
	uint64_t start = message->arg.remove.start, finish = message->arg.remove.end;

	if (message->event == UFFD_EVENT_PAGEFAULT) {
		resolve_fault(saver, message->arg.pagefault.address);
	} else if (message->event == UFFD_EVENT_REMAP) {
		uint64_t length = message->arg.remap.len;
		int ret = uffd_guard_add(&saver->guard, to, to + length);

		if (!ret && saver->saves)
			ret = uffd_owed_move(&saver->saving.owed, from, to, length);
		if (ret)
			end(saver, ret);
		note(saver, from, from + length, UFFD_SAVER_CHANGED);
		note(saver, to, to + length, UFFD_SAVER_CHANGED);
	} else if (message->event == UFFD_EVENT_REMOVE || message->event == UFFD_EVENT_UNMAP) {
		if (saver->saves)
			uffd_saving_before_drop(&saver->saving, start, finish);
		if (saver->saves && message->event == UFFD_EVENT_UNMAP &&
		    uffd_owed_remove(&saver->saving.owed, start, finish))
			end(saver, -ENOMEM);
		note(saver, start, finish, UFFD_SAVER_CHANGED);
	}
}

/* Returns whether there were messages. */
static bool answer(struct uffd_saver *saver)
{
	struct uffd_guarded *guarded = saver->guard.shared;
	struct uffd_msg messages[BATCH];
	uint64_t began;
	int64_t n;

	atomic_store(&guarded->busy, 1);
	n = uffd_shim_read(saver->options.uffd, messages, sizeof(messages));
	began = uffd_now_ns();
	for (uint64_t i = 0; n > 0 && i < (uint64_t)n / sizeof(*messages); i++) {
		uint64_t waited;

		if (!is_ended(saver))
			apply(saver, &messages[i]);
		atomic_fetch_add(&guarded->beat, 1);
		waited = uffd_now_ns() - began;
		if (messages[i].event == UFFD_EVENT_PAGEFAULT && saver->saves &&
		    waited > saver->stats.longest_ns)
			saver->stats.longest_ns = waited;
	}
	atomic_fetch_add(&guarded->beat, 1);
	atomic_store(&guarded->busy, 0);
	return n > 0;
}

/*
 * Whether the layout changes now: then the reason is in a message that is still unread.  The kernel
 * looks at that before it looks at the range.
 */
static bool is_changing(struct uffd_saver *saver)
{
	return uffd_shim_writeprotect(saver->options.uffd, 0, 0, 0) == -EAGAIN;
}

static bool may_sweep(struct uffd_saver *saver)
{
	uint64_t done = saver->saving.swept * BASE_PAGE;

	if (!saver->saves || !saver->saving.owed.left || is_ended(saver) ||
	    !uffd_saving_has_room(&saver->saving))
		return false;
	return !saver->options.rate ||
	       (double)done <= (double)(uffd_now_ns() - saver->began_ns) / 1e9 *
				       (double)saver->options.rate;
}

static void sweep(struct uffd_saver *saver)
{
	struct uffd_owed_piece *piece;
	uint64_t address = saver->swept_to;
	uint64_t pages = uffd_owed_next(&saver->saving.owed, address, UINT64_MAX, BATCH, &piece,
					&address);

	if (!pages) {
		saver->swept_to = 0; /* what has moved behind us */
		return;
	}
	saver->swept_to = address + pages * BASE_PAGE;
	if (!uffd_saving_all(&saver->saving, piece, address, pages)) {
		/* Messages first: they tell what has become of the pages. */
		if (is_ended(saver) || answer(saver) || is_changing(saver)) {
			saver->swept_to = address;
			return;
		}
		uffd_saving_each(&saver->saving, piece, address, pages);
	}
	uffd_shim_writeprotect(saver->options.uffd, address, pages * BASE_PAGE, 0);
}

static void check_others(struct uffd_saver *saver)
{
	int error = uffd_ring_error(saver->saving.ring, 0);

	if (!is_ended(saver) && atomic_load(&saver->guard.shared->ended))
		end(saver, -ETIMEDOUT);
	else if (error)
		end(saver, error);
	if (saver->saves && !saver->saving.owed.left)
		pthread_cond_broadcast(&saver->changed);
}

static void *run(void *argument)
{
	struct uffd_saver *saver = argument;

	prctl(PR_SET_NAME, "uffd-save");
	for (;;) {
		struct pollfd ready = { .fd = saver->options.uffd, .events = POLLIN };
		bool busy, stop, waits;

		for (unsigned int i = 0; atomic_load(&saver->callers); i++)
			uffd_back_off(i);
		pthread_mutex_lock(&saver->lock);
		busy = answer(saver);
		if (!busy && may_sweep(saver)) {
			sweep(saver);
			busy = true;
		}
		check_others(saver);
		waits = saver->saves && saver->saving.owed.left;
		stop = saver->stop;
		pthread_mutex_unlock(&saver->lock);
		if (stop)
			return NULL;
		if (!busy)
			poll(&ready, 1, waits ? BUSY_MS : IDLE_MS);
	}
}

int uffd_saver_create(const struct uffd_saver_options *options, struct uffd_saver **saver_ret)
{
	struct uffd_saver *saver = calloc(1, sizeof(*saver));
	pthread_condattr_t monotonic;
	sigset_t all, before;
	int ret;

	*saver_ret = NULL;
	if (!saver)
		return -ENOMEM;
	saver->options = *options;
	saver->saving = (struct uffd_saving){
		.pid = options->pid,
		.mem_fd = options->mem_fd,
		.pagemap_fd = options->pagemap_fd,
		.memory_pages = options->memory_pages,
		.max_stall_ns = options->max_stall_ns,
	};
	ret = uffd_ring_create(options->fd, options->memory_pages, &saver->saving.ring);
	if (!ret)
		ret = uffd_guard_start(&saver->guard, options->uffd, options->max_stall_ns);
	if (ret) {
		uffd_ring_destroy(saver->saving.ring);
		free(saver);
		return ret;
	}
	pthread_mutex_init(&saver->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&saver->changed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = -pthread_create(&saver->thread, NULL, run, saver);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (ret) {
		uffd_guard_stop(&saver->guard);
		uffd_ring_destroy(saver->saving.ring);
		free(saver);
		return ret;
	}
	*saver_ret = saver;
	return 0;
}

int uffd_saver_arm(struct uffd_saver *saver, const struct uffd_page_region *vec, uint64_t count,
		   uint32_t registers)
{
	int ret = 0;

	for (uint64_t i = 0; !ret && i < count; i++) {
		uint64_t length = vec[i].end - vec[i].start, ioctls;

		if (registers) {
			lock(saver);
			ret = uffd_guard_add(&saver->guard, vec[i].start, vec[i].end);
			pthread_mutex_unlock(&saver->lock);
			if (!ret)
				ret = uffd_shim_register(saver->options.uffd, vec[i].start, length,
							 UFFDIO_REGISTER_MODE_WP, &ioctls);
			continue;
		}
		for (unsigned int attempt = 0;; attempt++) {
			ret = uffd_shim_writeprotect(saver->options.uffd, vec[i].start, length,
						     UFFDIO_WRITEPROTECT_MODE_WP);
			if (ret != -EAGAIN || attempt > 1000)
				break;
			uffd_back_off(attempt);
		}
	}
	return ret;
}

int uffd_saver_take_noted(struct uffd_saver *saver, struct uffd_page_ranges *ranges_ret)
{
	int ret;

	lock(saver);
	while (answer(saver))
		;
	*ranges_ret = saver->noted;
	saver->noted = (struct uffd_page_ranges){ 0 };
	ret = saver->stats.error;
	pthread_mutex_unlock(&saver->lock);
	return ret;
}

int uffd_saver_begin(struct uffd_saver *saver, const struct uffd_image_piece *parts,
		     uint64_t parts_count, const struct uffd_page_region *pages, uint64_t count)
{
	int ret;

	lock(saver);
	ret = saver->stats.error ? saver->stats.error : saver->saves ? -EBUSY : 0;
	if (!ret)
		ret = uffd_owed_init(&saver->saving.owed, parts, parts_count, pages, count);
	saver->saves = !ret;
	saver->began_ns = uffd_now_ns();
	pthread_mutex_unlock(&saver->lock);
	return ret;
}

int uffd_saver_wait(struct uffd_saver *saver, uint64_t limit_ns)
{
	uint64_t until_ns = uffd_now_ns() + limit_ns;
	struct timespec until = { (time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u) };
	int ret = 0;

	lock(saver);
	while (!ret && !saver->stats.error && saver->saving.owed.left)
		ret = pthread_cond_timedwait(&saver->changed, &saver->lock, &until);
	ret = saver->stats.error ? saver->stats.error : saver->saving.owed.left ? -EAGAIN : 0;
	pthread_mutex_unlock(&saver->lock);
	return ret ? ret : uffd_ring_error(saver->saving.ring, 1);
}

void uffd_saver_stats(struct uffd_saver *saver, struct uffd_saver_stats *stats_ret)
{
	lock(saver);
	*stats_ret = saver->stats;
	stats_ret->faults = saver->saving.faults;
	stats_ret->swept = saver->saving.swept;
	stats_ret->left = saver->saving.owed.left;
	stats_ret->dropped = saver->saving.owed.dropped;
	pthread_mutex_unlock(&saver->lock);
}

int uffd_saver_ranges(struct uffd_saver *saver, uint32_t state,
		      struct uffd_page_ranges *ranges_ret)
{
	int ret;

	lock(saver);
	ret = uffd_owed_ranges(&saver->saving.owed, (uint8_t)state, ranges_ret);
	pthread_mutex_unlock(&saver->lock);
	return ret;
}

void uffd_saver_destroy(struct uffd_saver *saver)
{
	if (!saver)
		return;
	lock(saver);
	saver->stop = true;
	pthread_mutex_unlock(&saver->lock);
	pthread_join(saver->thread, NULL);
	uffd_guard_lift(saver->guard.shared, saver->options.uffd);
	uffd_guard_stop(&saver->guard);
	uffd_ring_destroy(saver->saving.ring);
	uffd_owed_deinit(&saver->saving.owed);
	uffd_pagemap_free(saver->noted.vec);
	pthread_mutex_destroy(&saver->lock);
	pthread_cond_destroy(&saver->changed);
	free(saver);
}
