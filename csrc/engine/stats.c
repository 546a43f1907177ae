// SPDX-License-Identifier: MIT
/* Counters, latencies and recent faults, written without a lock. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "stats.h"
#include "base/clock.h"

/* Readers wait at most this long: an ioctl may be reading from a slow disk. */
#define AWAIT_LIMIT_NS	100000000

static bool await_phase(struct uffd_engine *engine, uint64_t give_up)
{
	uint32_t phase = atomic_fetch_xor(&engine->phase, 1);
	unsigned int attempt = 0;

	while (atomic_load(&engine->at_work[phase])) {
		if (uffd_now_ns() > give_up)
			return false;
		uffd_back_off(attempt++);
	}
	return true;
}

/* Twice: a thread that read the phase before the first change may begin after it. */
bool await_work_until(struct uffd_engine *engine, uint64_t give_up)
{
	bool done;

	pthread_mutex_lock(&engine->await_lock);
	done = await_phase(engine, give_up) && await_phase(engine, give_up);
	pthread_mutex_unlock(&engine->await_lock);
	return done;
}

void await_work(struct uffd_engine *engine)
{
	await_work_until(engine, uffd_now_ns() + AWAIT_LIMIT_NS);
}

enum uffd_fault_kind fault_kind(uint64_t flags)
{
	if (flags & UFFD_PAGEFAULT_FLAG_WP)
		return UFFD_KIND_WP;
	if (flags & UFFD_PAGEFAULT_FLAG_MINOR)
		return UFFD_KIND_MINOR;
	return UFFD_KIND_MISSING;
}

static uint32_t histogram_bucket(uint64_t ns)
{
	uint32_t exponent, bucket;

	if (ns < UFFD_HISTOGRAM_SUB)
		return (uint32_t)ns;
	exponent = 63 - (uint32_t)__builtin_clzll(ns);
	bucket = (exponent - 2) * UFFD_HISTOGRAM_SUB +
		 ((ns >> (exponent - 3)) & (UFFD_HISTOGRAM_SUB - 1));
	return bucket < UFFD_HISTOGRAM_BUCKETS ? bucket : UFFD_HISTOGRAM_BUCKETS - 1;
}

/* The smallest latency above the bucket. */
uint64_t uffd_histogram_bound(uint32_t bucket)
{
	uint32_t exponent, sub;

	if (bucket < UFFD_HISTOGRAM_SUB)
		return bucket + 1;
	exponent = bucket / UFFD_HISTOGRAM_SUB + 2;
	sub = bucket % UFFD_HISTOGRAM_SUB;
	return (uint64_t)(UFFD_HISTOGRAM_SUB + sub + 1) << (exponent - 3);
}

static void log_fault(struct uffd_engine *engine, uint32_t space, uint64_t address,
		      uint64_t flags, uint32_t thread_id, uint64_t now)
{
	struct fault_log *log = engine->fault_log;
	struct log_place *place;
	uint64_t ticket;

	if (!log)
		return;
	ticket = atomic_load_explicit(&log->next, memory_order_relaxed);
	do {
		if (ticket - atomic_load_explicit(&log->taken, memory_order_acquire) >=
		    log->capacity) {
			atomic_fetch_add_explicit(&log->lost, 1, memory_order_relaxed);
			return;
		}
	} while (!atomic_compare_exchange_weak_explicit(&log->next, &ticket, ticket + 1,
							memory_order_acq_rel,
							memory_order_relaxed));
	place = &log->places[ticket % log->capacity];
	place->fault = (struct uffd_logged_fault){
		.address = address,
		.time_ns = now,
		.flags = (uint32_t)flags,
		.thread_id = thread_id,
		.space = space,
	};
	atomic_store_explicit(&place->written, ticket + 1, memory_order_release);
}

uint64_t fault_log_size(uint64_t capacity)
{
	return capacity ? sizeof(struct fault_log) + capacity * sizeof(struct log_place) : 0;
}

void fault_log_open(struct uffd_engine *engine, void *memory)
{
	struct fault_log *log = memory;
	uint64_t end = atomic_load(&log->next);

	log->capacity = engine->options.fault_log;
	/* A thread that was killed has taken these tickets, and will write nothing. */
	for (uint64_t ticket = atomic_load(&log->taken); ticket < end; ticket++) {
		struct log_place *place = &log->places[ticket % log->capacity];

		if (atomic_load(&place->written) == ticket + 1)
			continue;
		place->fault = (struct uffd_logged_fault){ 0 };
		atomic_store(&place->written, ticket + 1);
		atomic_fetch_add(&log->lost, 1);
	}
	engine->fault_log = log;
}

uint32_t uffd_engine_take_faults(struct uffd_engine *engine,
				 struct uffd_logged_fault *faults_ret, uint32_t capacity,
				 uint64_t *lost_ret)
{
	struct fault_log *log = engine->fault_log;
	uint32_t found = 0;
	uint64_t ticket;

	*lost_ret = 0;
	if (!log)
		return 0;
	pthread_mutex_lock(&engine->fault_log_lock);
	for (ticket = atomic_load(&log->taken); found < capacity; ticket++) {
		const struct log_place *place = &log->places[ticket % log->capacity];

		if (atomic_load_explicit(&place->written, memory_order_acquire) != ticket + 1)
			break;
		faults_ret[found] = place->fault;
		/* All zeros: lost with a process that was killed. */
		found += faults_ret[found].time_ns != 0;
	}
	atomic_store_explicit(&log->taken, ticket, memory_order_release);
	*lost_ret = atomic_exchange(&log->lost, 0);
	pthread_mutex_unlock(&engine->fault_log_lock);
	return found;
}

uint64_t uffd_engine_logged_faults(struct uffd_engine *engine)
{
	struct fault_log *log = engine->fault_log;

	if (!log)
		return 0;
	await_work(engine);
	return atomic_load(&log->next) - atomic_load(&log->taken);
}

void note_fault(struct uffd_engine *engine, uint32_t space, uint64_t address, uint64_t flags,
		uint32_t thread_id, uint64_t began_ns)
{
	struct stats_shard *shard = &engine->shared->shards[current_cpu() % UFFD_SHARDS];
	enum uffd_fault_kind kind = fault_kind(flags);
	uint64_t now = uffd_now_ns();
	struct uffd_recent_fault *recent;
	uint32_t bucket = histogram_bucket(now - began_ns);

	atomic_fetch_add_explicit(&shard->counters[COUNTER(faults) + kind], 1,
				  memory_order_relaxed);
	atomic_fetch_add_explicit(&shard->counters[COUNTER(latency_ns) +
						   kind * UFFD_HISTOGRAM_BUCKETS + bucket], 1,
				  memory_order_relaxed);
	recent = &shard->recent[atomic_fetch_add_explicit(&shard->recent_next, 1,
							  memory_order_relaxed) %
				RECENT_PER_SHARD];
	/* A reader sees time 0 while the rest is being written. */
	__atomic_store_n(&recent->time_ns, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&recent->address, address, __ATOMIC_RELAXED);
	__atomic_store_n(&recent->latency_ns, now - began_ns, __ATOMIC_RELAXED);
	__atomic_store_n(&recent->flags, (uint32_t)flags, __ATOMIC_RELAXED);
	__atomic_store_n(&recent->thread_id, thread_id, __ATOMIC_RELAXED);
	__atomic_store_n(&recent->time_ns, now, __ATOMIC_RELEASE);
	if (kind != UFFD_KIND_WP)
		log_fault(engine, space, address, flags, thread_id, now);
}

void uffd_engine_stats(struct uffd_engine *engine, struct uffd_stats *stats_ret)
{
	uint64_t *sums = (uint64_t *)stats_ret;

	await_work(engine);
	memset(stats_ret, 0, sizeof(*stats_ret));
	for (size_t shard = 0; shard < UFFD_SHARDS; shard++)
		for (size_t i = 0; i < sizeof(*stats_ret) / sizeof(*sums); i++)
			sums[i] += atomic_load_explicit(&engine->shared->shards[shard].counters[i],
							memory_order_relaxed);
}

uint64_t uffd_engine_fault_count(struct uffd_engine *engine)
{
	uint64_t sum = 0;

	for (size_t shard = 0; shard < UFFD_SHARDS; shard++)
		for (size_t kind = 0; kind < UFFD_KINDS; kind++)
			if (kind != UFFD_KIND_WP)
				sum += atomic_load_explicit(
					&engine->shared->shards[shard].counters[COUNTER(faults) + kind],
					memory_order_relaxed);
	return sum;
}

static int newer_first(const void *a, const void *b)
{
	const struct uffd_recent_fault *left = a, *right = b;

	return (left->time_ns < right->time_ns) - (left->time_ns > right->time_ns);
}

uint32_t uffd_engine_recent(struct uffd_engine *engine, struct uffd_recent_fault *recent_ret,
			    uint32_t capacity)
{
	uint32_t found = 0;

	await_work(engine);
	for (size_t shard = 0; shard < UFFD_SHARDS; shard++) {
		for (size_t i = 0; i < RECENT_PER_SHARD && found < capacity; i++) {
			struct uffd_recent_fault *slot = &engine->shared->shards[shard].recent[i];
			struct uffd_recent_fault *copy = &recent_ret[found];

			copy->time_ns = __atomic_load_n(&slot->time_ns, __ATOMIC_ACQUIRE);
			copy->address = __atomic_load_n(&slot->address, __ATOMIC_RELAXED);
			copy->latency_ns = __atomic_load_n(&slot->latency_ns, __ATOMIC_RELAXED);
			copy->flags = __atomic_load_n(&slot->flags, __ATOMIC_RELAXED);
			copy->thread_id = __atomic_load_n(&slot->thread_id, __ATOMIC_RELAXED);
			atomic_thread_fence(memory_order_acquire);
			if (copy->time_ns &&
			    copy->time_ns == __atomic_load_n(&slot->time_ns, __ATOMIC_RELAXED))
				found++;
		}
	}
	qsort(recent_ret, found, sizeof(*recent_ret), newer_first);
	return found;
}

uint32_t uffd_engine_recent_count(struct uffd_engine *engine)
{
	uint32_t found = 0;

	for (size_t shard = 0; shard < UFFD_SHARDS; shard++)
		for (size_t i = 0; i < RECENT_PER_SHARD; i++)
			if (__atomic_load_n(&engine->shared->shards[shard].recent[i].time_ns,
					    __ATOMIC_RELAXED))
				found++;
	return found;
}
