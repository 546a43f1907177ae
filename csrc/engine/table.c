// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>

#include "alloc.h"
#include "table.h"
#include "base/clock.h"

#define FIRST_CAPACITY 16

/* An array that was replaced by a larger one; this header precedes its data. */
struct outgrown {
	struct outgrown *next;
};

static void lock_table(struct uffd_table *table, sigset_t *old)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, old);
	pthread_mutex_lock(&table->lock);
}

static void unlock_table(struct uffd_table *table, const sigset_t *old)
{
	pthread_mutex_unlock(&table->lock);
	pthread_sigmask(SIG_SETMASK, old, NULL);
}

static void begin_change(struct uffd_table *table)
{
	uint64_t sequence = atomic_load_explicit(&table->sequence, memory_order_relaxed);

	atomic_store_explicit(&table->sequence, sequence + 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
}

static void end_change(struct uffd_table *table)
{
	uint64_t sequence = atomic_load_explicit(&table->sequence, memory_order_relaxed);

	atomic_store_explicit(&table->sequence, sequence + 1, memory_order_release);
}

void uffd_table_init(struct uffd_table *table)
{
	memset(table, 0, sizeof(*table));
	pthread_mutex_init(&table->lock, NULL);
}

static void *new_array(size_t capacity)
{
	struct outgrown *block = uffd_alloc(sizeof(*block) + capacity * sizeof(uint64_t));

	return block ? block + 1 : NULL;
}

static void retire_array(struct uffd_table *table, void *array)
{
	struct outgrown *block;

	if (!array)
		return;
	block = (struct outgrown *)array - 1;
	block->next = table->outgrown;
	table->outgrown = block;
}

void uffd_table_deinit(struct uffd_table *table)
{
	struct outgrown *block, *next;

	retire_array(table, atomic_load(&table->starts));
	retire_array(table, atomic_load(&table->ranges));
	for (block = table->outgrown; block; block = next) {
		next = block->next;
		uffd_free(block);
	}
	pthread_mutex_destroy(&table->lock);
}

/* How many ranges start at or below the address. */
static size_t count_at_or_below(const uint64_t *starts, size_t count, uint64_t address)
{
	const uint64_t *base = starts;

	while (count > 0) {
		size_t half = (count + 1) / 2;

		/* Relaxed: the sequence check discards a torn view. */
		if (__atomic_load_n(&base[half - 1], __ATOMIC_RELAXED) <= address)
			base += half;
		else if (half == 1)
			break;
		count -= half;
	}
	return (size_t)(base - starts);
}

struct uffd_range *uffd_table_before(struct uffd_table *table, uint64_t address)
{
	struct uffd_range *range;
	uint64_t before, after;

	do {
		struct uffd_range **ranges;
		uint64_t *starts;
		size_t count;

		before = atomic_load_explicit(&table->sequence, memory_order_acquire);
		starts = atomic_load_explicit(&table->starts, memory_order_relaxed);
		ranges = atomic_load_explicit(&table->ranges, memory_order_relaxed);
		count = atomic_load_explicit(&table->count, memory_order_relaxed);
		range = NULL;
		after = before + 1;
		if (before & 1) {
			__builtin_ia32_pause();
			continue;
		}
		count = count ? count_at_or_below(starts, count, address) : 0;
		if (count)
			range = __atomic_load_n(&ranges[count - 1], __ATOMIC_RELAXED);
		atomic_thread_fence(memory_order_acquire);
		after = atomic_load_explicit(&table->sequence, memory_order_relaxed);
	} while (before != after);
	return range;
}

struct uffd_range *uffd_table_find(struct uffd_table *table, uint64_t address)
{
	struct uffd_range *range = uffd_table_before(table, address);

	return range && address < __atomic_load_n(&range->end, __ATOMIC_RELAXED) ? range : NULL;
}

struct uffd_range *uffd_table_next(struct uffd_table *table, uint64_t address)
{
	struct uffd_range *range = NULL;
	size_t at, count;
	sigset_t old;

	lock_table(table, &old);
	count = atomic_load(&table->count);
	if (count) {
		struct uffd_range **ranges = atomic_load(&table->ranges);

		at = count_at_or_below(atomic_load(&table->starts), count, address);
		if (at && ranges[at - 1]->end > address)
			at--;
		range = at < count ? ranges[at] : NULL;
	}
	unlock_table(table, &old);
	return range;
}

static int grow(struct uffd_table *table)
{
	size_t count = atomic_load(&table->count);
	size_t capacity = table->capacity ? 2 * table->capacity : FIRST_CAPACITY;
	uint64_t *starts = new_array(capacity);
	struct uffd_range **ranges = new_array(capacity);

	if (!starts || !ranges) {
		uffd_free(starts ? (struct outgrown *)starts - 1 : NULL);
		uffd_free(ranges ? (struct outgrown *)ranges - 1 : NULL);
		return -ENOMEM;
	}
	if (count) {
		memcpy(starts, atomic_load(&table->starts), count * sizeof(*starts));
		memcpy(ranges, atomic_load(&table->ranges), count * sizeof(*ranges));
	}
	begin_change(table);
	retire_array(table, atomic_exchange(&table->starts, starts));
	retire_array(table, atomic_exchange(&table->ranges, ranges));
	table->capacity = capacity;
	end_change(table);
	return 0;
}

static int make_room(struct uffd_table *table)
{
	return atomic_load(&table->count) + table->reserved >= table->capacity ? grow(table) : 0;
}

/* Each store is atomic, as searches run concurrently; they discard what they found. */
static void put(struct uffd_table *table, size_t at, uint64_t start, struct uffd_range *range)
{
	__atomic_store_n(&atomic_load(&table->starts)[at], start, __ATOMIC_RELAXED);
	__atomic_store_n(&atomic_load(&table->ranges)[at], range, __ATOMIC_RELAXED);
}

static void move_entry(struct uffd_table *table, size_t to, size_t from)
{
	put(table, to, atomic_load(&table->starts)[from], atomic_load(&table->ranges)[from]);
}

int uffd_table_insert(struct uffd_table *table, struct uffd_range *range)
{
	struct uffd_range **ranges;
	size_t at, count;
	sigset_t old;
	int r = 0;

	lock_table(table, &old);
	count = atomic_load(&table->count);
	at = count ? count_at_or_below(atomic_load(&table->starts), count, range->start) : 0;
	ranges = atomic_load(&table->ranges);
	if ((at > 0 && ranges[at - 1]->end > range->start) ||
	    (at < count && ranges[at]->start < range->end))
		r = -EEXIST;
	else
		r = make_room(table);
	if (r == 0) {
		begin_change(table);
		for (size_t i = count; i > at; i--)
			move_entry(table, i, i - 1);
		put(table, at, range->start, range);
		atomic_store(&table->count, count + 1);
		end_change(table);
	}
	unlock_table(table, &old);
	return r;
}

/*
 * Readers only look up a range: the first limit is far longer than that takes on a busy
 * machine.  The second one applies after the first was not enough.
 */
#define READERS_LIMIT_NS	1000000000
#define HELD_UP_LIMIT_NS	1000000

static bool wait_for_readers(struct uffd_table *table, uint64_t limit_ns)
{
	uint64_t give_up = uffd_now_ns() + limit_ns;

	for (size_t shard = 0; shard < UFFD_SHARDS; shard++)
		while (atomic_load(&table->shards[shard].readers)) {
			if (uffd_now_ns() >= give_up)
				return false;
			sched_yield();
		}
	return true;
}

bool uffd_table_is_quiet(struct uffd_table *table)
{
	return wait_for_readers(table, 0);
}

/* With the table locked. */
static void exchange(struct uffd_table *table, const struct uffd_range *range,
		     struct uffd_range *const *parts, size_t n)
{
	size_t count = atomic_load(&table->count);
	size_t at = count_at_or_below(atomic_load(&table->starts), count, range->start) - 1;

	begin_change(table);
	if (n == 2)
		for (size_t i = count; i > at + 1; i--)
			move_entry(table, i, i - 1);
	if (n == 0)
		for (size_t i = at + 1; i < count; i++)
			move_entry(table, i - 1, i);
	for (size_t i = 0; i < n; i++)
		put(table, at + i, parts[i]->start, parts[i]);
	atomic_store(&table->count, count + n - 1);
	end_change(table);
}

static bool await_readers(struct uffd_table *table)
{
	bool is_quiet;

	atomic_thread_fence(memory_order_seq_cst);
	is_quiet = wait_for_readers(table, atomic_load(&table->is_held_up) ? HELD_UP_LIMIT_NS
									   : READERS_LIMIT_NS);
	atomic_store(&table->is_held_up, !is_quiet);
	return is_quiet;
}

bool uffd_table_remove(struct uffd_table *table, struct uffd_range *range)
{
	sigset_t old;

	lock_table(table, &old);
	exchange(table, range, NULL, 0);
	unlock_table(table, &old);
	return await_readers(table);
}

bool uffd_table_replace(struct uffd_table *table, struct uffd_range *range,
			struct uffd_range *const *parts, size_t count)
{
	sigset_t old;

	lock_table(table, &old);
	exchange(table, range, parts, count);
	table->reserved -= count == 2;
	unlock_table(table, &old);
	return await_readers(table);
}

int uffd_table_reserve(struct uffd_table *table)
{
	sigset_t old;
	int r;

	lock_table(table, &old);
	r = make_room(table);
	table->reserved += r == 0;
	unlock_table(table, &old);
	return r;
}

void uffd_table_unreserve(struct uffd_table *table)
{
	sigset_t old;

	lock_table(table, &old);
	table->reserved--;
	unlock_table(table, &old);
}
