// SPDX-License-Identifier: MIT
/* The list of places from which pieces were moved, linked by `next_lost`. */
#define _GNU_SOURCE
#include <errno.h>

#include "failures.h"
#include "range.h"
#include "vacated.h"

static pthread_mutex_t *lock_of(struct uffd_space *space)
{
	return &space->engine->registered_lock;
}

/* Under the lock. */
static void add(struct uffd_space *space, struct uffd_range *place)
{
	place->next_lost = space->vacated;
	space->vacated = place;
	atomic_fetch_add(&space->engine->vacated, 1);
}

static struct uffd_range *take(struct uffd_space *space, struct uffd_range **link)
{
	struct uffd_range *place = *link;

	*link = place->next_lost;
	place->next_lost = NULL;
	atomic_fetch_sub(&space->engine->vacated, 1);
	return place;
}

/* The part [start, end) of a piece, as a place at `at`; NULL, and noted, if out of memory. */
static struct uffd_range *place_of(struct uffd_space *space, const struct uffd_range *range,
				   uint64_t start, uint64_t end, uint64_t at)
{
	struct uffd_range *place = range_create(space, range, at, at + (end - start),
						content_offset(range, start));

	if (place)
		place->is_left = true;
	else
		note_failure(space->engine, at, end - start, -ENOMEM, UFFD_FAILED_RESOLVE);
	return place;
}

void note_vacated(const struct uffd_range *range, uint64_t start, uint64_t end)
{
	struct uffd_space *space = range->space;
	struct uffd_range *place = place_of(space, range, start, end, start);

	if (!place)
		return;
	pthread_mutex_lock(lock_of(space));
	add(space, place);
	pthread_mutex_unlock(lock_of(space));
}

void move_vacated(struct uffd_space *space, uint64_t from, uint64_t to, uint64_t length)
{
	struct uffd_range *moved = NULL, *one;

	pthread_mutex_lock(lock_of(space));
	for (one = space->vacated; one; one = one->next_lost) {
		uint64_t start = higher(one->start, from), end = lower(one->end, from + length);
		struct uffd_range *place;

		if (start >= end)
			continue;
		place = place_of(space, one, start, end, start - from + to);
		if (!place)
			continue;
		place->next_lost = moved;
		moved = place;
	}
	while ((one = moved)) {
		moved = one->next_lost;
		add(space, one);
	}
	pthread_mutex_unlock(lock_of(space));
}

void clone_vacated(struct uffd_space *parent, struct uffd_space *child)
{
	pthread_mutex_lock(lock_of(parent));
	for (const struct uffd_range *one = parent->vacated; one; one = one->next_lost) {
		struct uffd_range *place = place_of(child, one, one->start, one->end, one->start);

		if (place)
			add(child, place);
	}
	pthread_mutex_unlock(lock_of(parent));
}

/* Take [start, end) out of a place that reaches beyond it. */
static void shorten(struct uffd_range *place, uint64_t start, uint64_t end)
{
	struct uffd_space *space = place->space;

	if (place->start < start && end < place->end) {
		struct uffd_range *behind = place_of(space, place, end, place->end, end);

		if (behind)
			add(space, behind);
	}
	if (place->start < start) {
		place->end = start;
	} else {
		place->origin += end - place->start;
		place->start = end;
	}
}

void forget_vacated(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range **link = &space->vacated, *one;

	pthread_mutex_lock(lock_of(space));
	while ((one = *link)) {
		if (one->start >= start && one->end <= end) {
			range_free(take(space, link));
			continue;
		}
		if (one->start < end && start < one->end)
			shorten(one, start, end);
		link = &one->next_lost;
	}
	pthread_mutex_unlock(lock_of(space));
}

bool has_vacated(struct uffd_space *space)
{
	bool found;

	pthread_mutex_lock(lock_of(space));
	found = space->vacated;
	pthread_mutex_unlock(lock_of(space));
	return found;
}

bool is_vacated(struct uffd_space *space, uint64_t address)
{
	const struct uffd_range *one;

	if (!atomic_load(&space->engine->vacated))
		return false;
	pthread_mutex_lock(lock_of(space));
	one = space->vacated;
	while (one && (address < one->start || address >= one->end))
		one = one->next_lost;
	pthread_mutex_unlock(lock_of(space));
	return one;
}

void unlink_vacated(struct uffd_range *place)
{
	struct uffd_range **link = &place->space->vacated;

	pthread_mutex_lock(lock_of(place->space));
	while (*link != place)
		link = &(*link)->next_lost;
	take(place->space, link);
	pthread_mutex_unlock(lock_of(place->space));
}

void drop_vacated(struct uffd_space *space)
{
	struct uffd_range *place;

	while ((place = space->vacated)) {
		unlink_vacated(place);
		range_free(place);
	}
}
