// SPDX-License-Identifier: MIT
/*
 * The list of the memory registered in an address space.
 *
 * A superfluous entry does little harm: growth into it is refused.  Memory that the list
 * lacks would be filled with zeros.  So add entries before removing others, and never
 * split one.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "alloc.h"
#include "registered.h"
#include "uffd_shim.h"

bool is_registered(struct uffd_space *space, uint64_t address)
{
	unsigned int shard;
	bool found;

	if (!atomic_load(&space->knows_registered))
		return true;
	shard = uffd_table_enter(&space->registered, current_cpu());
	found = uffd_table_find(&space->registered, address);
	uffd_table_leave(&space->registered, shard);
	return found;
}

/*
 * Try to copy from unreadable memory, which changes nothing: this fails with ENOENT if the
 * target leaves its first mapping or is not registered, otherwise with EFAULT, or with
 * EEXIST if the page is present.  It works for other processes as well.
 */
int is_one_mapping(const struct uffd_range *range, uint64_t start, uint64_t end, bool *one_ret)
{
	uint64_t unreadable = (uint64_t)(uintptr_t)range->space->engine->unreadable;
	int64_t done;
	int r = uffd_shim_copy(range->space->fd, start, unreadable, end - start,
			       UFFDIO_COPY_MODE_DONTWAKE, &done);

	*one_ret = r == -EFAULT || r == -EEXIST || r == -ENOMEM;
	return r == -EAGAIN || r == -ESRCH ? r : 0;
}

static void drop_entry(struct uffd_space *space, struct uffd_range *entry)
{
	/* Leak it if a reader may still use it. */
	if (uffd_table_remove(&space->registered, entry))
		uffd_free(entry);
}

static int add_entry(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *entry = uffd_alloc(sizeof(*entry));
	int r;

	if (!entry)
		return -ENOMEM;
	entry->start = start;
	entry->end = end;
	r = uffd_table_insert(&space->registered, entry);
	if (r)
		uffd_free(entry);
	return r;
}

/* Add the parts of [start, end) that are not listed yet. */
static int add_gaps(struct uffd_space *space, uint64_t start, uint64_t end)
{
	int r = 0;

	while (start < end && r == 0) {
		struct uffd_range *next = uffd_table_next(&space->registered, start);
		uint64_t stop = next && next->start < end ? next->start : end;

		if (start < stop)
			r = add_entry(space, start, stop);
		start = next && next->start < end ? next->end : end;
	}
	if (r)
		atomic_store(&space->knows_registered, false);
	return r;
}

static void drop_all(struct uffd_space *space, uint64_t start, uint64_t end)
{
	struct uffd_range *entry;
	uint64_t at = start;

	while ((entry = uffd_table_next(&space->registered, at)) && entry->start < end) {
		at = entry->end;
		if (entry->start >= start && entry->end <= end)
			drop_entry(space, entry);
		else if (entry->start < start && entry->end <= end)
			__atomic_store_n(&entry->end, start, __ATOMIC_RELAXED);
	}
}

uint64_t next_registered(struct uffd_space *space, uint64_t address, uint64_t end)
{
	struct uffd_range *next;

	pthread_mutex_lock(&space->engine->registered_lock);
	next = uffd_table_next(&space->registered, address);
	if (next && next->start < end)
		end = higher(next->start, address);
	pthread_mutex_unlock(&space->engine->registered_lock);
	return end;
}

int list_registered(struct uffd_space *space, uint64_t start, uint64_t end)
{
	int r;

	pthread_mutex_lock(&space->engine->registered_lock);
	r = add_gaps(space, start, end);
	pthread_mutex_unlock(&space->engine->registered_lock);
	return r;
}

void unlist_registered(struct uffd_space *space, uint64_t start, uint64_t end)
{
	pthread_mutex_lock(&space->engine->registered_lock);
	drop_all(space, start, end);
	pthread_mutex_unlock(&space->engine->registered_lock);
}

void move_registered(struct uffd_space *space, uint64_t from, uint64_t to, uint64_t length)
{
	struct uffd_range *entry;
	uint64_t at = from, end = from + length;

	pthread_mutex_lock(&space->engine->registered_lock);
	while ((entry = uffd_table_next(&space->registered, at)) && entry->start < end) {
		uint64_t start = higher(entry->start, from), stop = lower(entry->end, end);

		at = entry->end;
		add_gaps(space, start - from + to, stop - from + to);
	}
	drop_all(space, from, end);
	pthread_mutex_unlock(&space->engine->registered_lock);
}

void clone_registered(struct uffd_space *parent, struct uffd_space *child)
{
	struct uffd_range *entry;

	atomic_store(&child->knows_registered, atomic_load(&parent->knows_registered));
	pthread_mutex_lock(&parent->engine->registered_lock);
	for (entry = uffd_table_next(&parent->registered, 0); entry;
	     entry = uffd_table_next(&parent->registered, entry->end))
		add_gaps(child, entry->start, entry->end);
	pthread_mutex_unlock(&parent->engine->registered_lock);
}

void free_registered(struct uffd_space *space)
{
	struct uffd_range *entry;

	while ((entry = uffd_table_next(&space->registered, 0)))
		drop_entry(space, entry);
	uffd_table_deinit(&space->registered);
}
