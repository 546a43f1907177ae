// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "base/page.h"
#include "base/threads.h"
#include "dirty/ranges.h"
#include "snapshot/pages.h"
#include "snapshot/saver.h"
#include "uffd_shim.h"

#define PROTECT_MOST 1000u /* attempts */
/* Ranges up to this size are protected together: as quick as a call for one page of each. */
#define SMALL (128u << 10)
#define RUN_RANGES 1000u

static void lock(struct uffd_saver *saver)
{
	atomic_fetch_add(&saver->callers, 1);
	pthread_mutex_lock(&saver->lock);
	atomic_fetch_sub(&saver->callers, 1);
}

int uffd_saver_create(const struct uffd_saver_options *options, struct uffd_saver **saver_ret)
{
	struct uffd_saver *saver = calloc(1, sizeof(*saver));
	int ret;

	*saver_ret = NULL;
	if (!saver)
		return -ENOMEM;
	saver->options = *options;
	saver->saving = (struct uffd_saving){
		.pid = options->pid,
		.uffd = options->uffd,
		.mem_fd = options->mem_fd,
		.pagemap_fd = options->pagemap_fd,
		.memory_pages = options->memory_pages,
		.max_stall_ns = options->max_stall_ns,
	};
	uffd_cold_open(&saver->saving.cold, options->pid);
	ret = uffd_ring_create(options->fd, options->memory_pages, &saver->saving.ring);
	if (!ret)
		ret = uffd_guard_start(&saver->guard, options->uffd, options->pid,
				       options->max_stall_ns);
	if (!ret) {
		ret = uffd_sweep_start(&saver->sweep, &saver->saving, options->fd, options->rate);
		if (ret)
			uffd_guard_stop(&saver->guard);
	}
	if (ret) {
		uffd_ring_destroy(saver->saving.ring);
		uffd_cold_close(&saver->saving.cold);
		free(saver);
		return ret;
	}
	pthread_mutex_init(&saver->lock, NULL);
	uffd_cond_init(&saver->changed);
	ret = uffd_thread_start(&saver->thread, NULL, uffd_saver_run, saver);
	if (ret) {
		uffd_sweep_stop(&saver->sweep);
		uffd_guard_stop(&saver->guard);
		uffd_ring_destroy(saver->saving.ring);
		uffd_cold_close(&saver->saving.cold);
		free(saver);
		return ret;
	}
	*saver_ret = saver;
	return 0;
}

/* While the layout changes the kernel refuses it. */
static int protect(struct uffd_saver *saver, uint64_t start, uint64_t length)
{
	int ret;

	for (unsigned int attempt = 0; attempt < PROTECT_MOST; attempt++) {
		ret = uffd_shim_writeprotect(saver->options.uffd, start, length,
					     UFFDIO_WRITEPROTECT_MODE_WP);
		if (ret != -EAGAIN)
			break;
		uffd_back_off(attempt);
	}
	return ret;
}

int uffd_saver_arm(struct uffd_saver *saver, const struct uffd_page_region *vec, uint64_t count,
		   uint32_t registers)
{
	int ret = 0;

	for (uint64_t i = 0; !ret && i < count; i++) {
		uint64_t length = vec[i].end - vec[i].start, ioctls;

		if (!registers) {
			ret = protect(saver, vec[i].start, length);
			continue;
		}
		ret = uffd_shim_register(saver->options.uffd, vec[i].start, length,
					 UFFDIO_REGISTER_MODE_WP, &ioctls);
	}
	return ret;
}

/* How many small ranges, from one on, are adjacent. */
static uint64_t adjacent(const struct uffd_page_region *vec, uint64_t count)
{
	uint64_t i = 0;

	while (i < count && i < RUN_RANGES && vec[i].end - vec[i].start <= SMALL &&
	       (!i || vec[i].start == vec[i - 1].end))
		i++;
	return i ? i : 1;
}

int uffd_saver_unregistered(struct uffd_saver *saver, const struct uffd_page_region *vec,
			    uint64_t count, struct uffd_page_ranges *ranges_ret)
{
	int ret = 0;

	for (uint64_t i = 0, run; !ret && i < count; i += run) {
		run = adjacent(vec + i, count - i);
		if (run > 1 && !protect(saver, vec[i].start, vec[i + run - 1].end - vec[i].start))
			continue;
		for (uint64_t j = i; !ret && j < i + run; j++)
			if (protect(saver, vec[j].start, BASE_PAGE))
				ret = uffd_ranges_append(ranges_ret, vec[j].start, vec[j].end);
	}
	return ret;
}

int uffd_saver_take_noted(struct uffd_saver *saver, struct uffd_page_ranges *ranges_ret,
			  struct uffd_page_ranges *changed_ret)
{
	struct uffd_page_ranges noted;
	int error, ret;

	lock(saver);
	while (uffd_saver_answer(saver))
		;
	noted = saver->noted;
	saver->noted = (struct uffd_page_ranges){ 0 };
	error = saver->stats.error;
	pthread_mutex_unlock(&saver->lock);
	ret = uffd_pages_as_set(&noted, 0, ranges_ret);
	if (!ret)
		ret = uffd_pages_as_set(&noted, UFFD_SAVER_CHANGED, changed_ret);
	uffd_pagemap_release(&noted);
	return error ? error : ret;
}

int uffd_saver_prepare(struct uffd_saver *saver, const struct uffd_image_piece *parts,
		       uint64_t parts_count, const struct uffd_page_region *pages, uint64_t count)
{
	int ret = 0;

	lock(saver);
	if (!saver->saves && !saver->saving.owed.parts) {
		for (uint64_t i = 0; !ret && i < count; i++)
			ret = uffd_ranges_append(&saver->ready, pages[i].start, pages[i].end);
		if (!ret)
			ret = uffd_owed_init(&saver->saving.owed, parts, parts_count, pages, count);
	}
	pthread_mutex_unlock(&saver->lock);
	return ret;
}

int uffd_saver_begin(struct uffd_saver *saver, const struct uffd_image_piece *parts,
		     uint64_t parts_count, const struct uffd_page_region *pages, uint64_t count)
{
	struct uffd_owed *owed = &saver->saving.owed;
	int ret;

	lock(saver);
	ret = saver->stats.error ? saver->stats.error : saver->saves ? -EBUSY : 0;
	if (!ret && uffd_owed_is_of(owed, parts, parts_count)) {
		ret = uffd_owed_change(owed, &saver->ready, pages, count);
	} else if (!ret) {
		uffd_owed_deinit(owed);
		ret = uffd_owed_init(owed, parts, parts_count, pages, count);
	}
	if (!ret) {
		saver->saves = true;
		saver->sweep.began_ns = uffd_now_ns();
	}
	pthread_mutex_unlock(&saver->lock);
	return ret;
}

int uffd_saver_wait(struct uffd_saver *saver, uint64_t limit_ns)
{
	uint64_t until_ns = uffd_now_ns() + limit_ns;
	struct timespec until = { (time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u) };
	int ret = 0;

	lock(saver);
	while (!ret && !saver->stats.error && uffd_saver_owes(saver))
		ret = pthread_cond_timedwait(&saver->changed, &saver->lock, &until);
	ret = saver->stats.error ? saver->stats.error : uffd_saver_owes(saver) ? -EAGAIN : 0;
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

void uffd_saver_destroy(struct uffd_saver **place)
{
	struct uffd_saver *saver = *place;

	*place = NULL;
	if (!saver)
		return;
	lock(saver);
	saver->stop = true;
	pthread_mutex_unlock(&saver->lock);
	pthread_join(saver->thread, NULL);
	uffd_sweep_stop(&saver->sweep);
	uffd_guard_lift(&saver->guard, saver->options.uffd);
	uffd_guard_stop(&saver->guard);
	uffd_ring_destroy(saver->saving.ring);
	uffd_cold_close(&saver->saving.cold);
	uffd_owed_deinit(&saver->saving.owed);
	uffd_unread_deinit(&saver->unread);
	uffd_pagemap_release(&saver->noted);
	uffd_pagemap_release(&saver->ready);
	pthread_mutex_destroy(&saver->lock);
	pthread_cond_destroy(&saver->changed);
	free(saver);
}
