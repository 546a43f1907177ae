// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "uffd_engine_internal.h"

#define BASE_PAGE		4096u
#define ZEROS_SIZE		(2u << 20)
#define HUGE_ZEROS_SIZE		(1u << 30)

/*
 * Prefetch yields to waiting faults after this much: some 50 us of copying, and
 * the cost of the extra ioctl is lost in it.
 */
#define PREFETCH_SLICE		(512u << 10)
/* Sequential faults double what is filled ahead, up to this many chunks. */
#define READAHEAD_MAX_CHUNKS	8
/* Populating and sealing go through a range in pieces, so that faults get between. */
#define BULK_SLICE		(4u << 20)
/* Messages read at once; the buffer grows when a read fills it. */
#define FIRST_MESSAGES		128

/* Ranges: the table owns nothing, so these make and unmake them. */

static void free_range(struct uffd_range *range)
{
	if (range->source == UFFD_SOURCE_FILE && range->source_mapped)
		munmap((void *)(uintptr_t)range->source_address, range->source_mapped);
	if (range->source_fd >= 0)
		close(range->source_fd);
	free(range->tail);
	free(range);
}

static int read_file_fully(int fd, void *buffer, uint64_t length, uint64_t offset)
{
	uint64_t done = 0;

	while (done < length) {
		ssize_t n = pread(fd, (char *)buffer + done, length - done, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		done += (uint64_t)n;
	}
	return 0;
}

static bool is_sealed(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);

	return seals >= 0 && (seals & F_SEAL_SHRINK);
}

static int open_file_source(struct uffd_range *range, const struct uffd_range_spec *spec)
{
	uint64_t lead = spec->source_offset % BASE_PAGE;
	void *mapping;

	range->source_fd = fcntl(spec->source_fd, F_DUPFD_CLOEXEC, 3);
	if (range->source_fd < 0)
		return -errno;
	range->source_offset = spec->source_offset;
	range->source_sealed = is_sealed(range->source_fd);
	if (!range->source_length)
		return 0;
	/*
	 * Mapped, so that UFFDIO_COPY reads the page cache itself.  Where the
	 * file ends early the ioctl says EFAULT; nobody here touches the mapping.
	 */
	mapping = mmap(NULL, range->source_length + lead, PROT_READ, MAP_SHARED, range->source_fd,
		       (off_t)(spec->source_offset - lead));
	if (mapping == MAP_FAILED)
		return -errno;
	range->source_mapped = range->source_length + lead;
	range->source_address = (uint64_t)(uintptr_t)mapping + lead;
	return 0;
}

/* The source ends inside the last page: keep that page, its rest zero, as mmap would. */
static int keep_tail(struct uffd_range *range, const struct uffd_range_spec *spec)
{
	uint64_t left = spec->source_length - range->source_length;
	int r = 0;

	range->tail = aligned_alloc(BASE_PAGE, range->page_size);
	if (!range->tail)
		return -ENOMEM;
	memset(range->tail, 0, range->page_size);
	if (spec->source == UFFD_SOURCE_FILE)
		r = read_file_fully(spec->source_fd, range->tail, left,
				    spec->source_offset + range->source_length);
	else
		memcpy(range->tail, (void *)(uintptr_t)(spec->source_address +
							range->source_length), left);
	return r;
}

static int open_source(struct uffd_range *range, const struct uffd_range_spec *spec)
{
	uint64_t length = range->end - range->start;
	int r = 0;

	if (range->source != UFFD_SOURCE_MEMORY && range->source != UFFD_SOURCE_FILE)
		return 0;
	if (spec->source_length <= length - range->page_size)
		return -ENODATA;
	range->source_length = spec->source_length >= length ? length : length - range->page_size;
	range->source_address = spec->source_address;
	if (range->source == UFFD_SOURCE_FILE)
		r = open_file_source(range, spec);
	if (r == 0 && spec->source_length < length)
		r = keep_tail(range, spec);
	return r;
}

static int ensure_zeros(struct uffd_engine *engine, uint64_t page_size)
{
	const void *expected = NULL;
	void *zeros;

	if (page_size <= ZEROS_SIZE || atomic_load(&engine->huge_zeros))
		return 0;
	zeros = mmap(NULL, HUGE_ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		     -1, 0);
	if (zeros == MAP_FAILED)
		return -errno;
	if (!atomic_compare_exchange_strong(&engine->huge_zeros, &expected, zeros))
		munmap(zeros, HUGE_ZEROS_SIZE);
	return 0;
}

int uffd_engine_add(struct uffd_engine *engine, const struct uffd_range_spec *spec,
		    uint64_t *id_ret)
{
	uint64_t pages = spec->length / spec->page_size;
	struct uffd_range *range;
	int r;

	range = calloc(1, sizeof(*range) + pages);
	if (!range)
		return -ENOMEM;
	range->start = spec->start;
	range->end = spec->start + spec->length;
	range->page_size = spec->page_size;
	range->page_shift = (uint32_t)__builtin_ctzll(spec->page_size);
	range->mode = spec->mode;
	range->source = spec->source;
	range->source_fd = -1;
	range->local = spec->local;
	range->preserve = spec->preserve;
	range->engine = engine;
	range->generation = atomic_fetch_add(&engine->next_generation, 1);
	atomic_store(&range->readahead_at, spec->start);
	if (!(spec->mode & (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR)))
		memset((void *)range->state, UFFD_PAGE_CLEAN, pages);
	r = open_source(range, spec);
	if (r == 0)
		r = ensure_zeros(engine, spec->page_size);
	if (r == 0)
		r = uffd_table_insert(engine->table, range);
	if (r) {
		free_range(range);
		return r;
	}
	*id_ret = spec->start;
	return 0;
}

/* Ranges are named by their start; only a range of this engine answers. */
static struct uffd_range *own_range(struct uffd_engine *engine, uint64_t id)
{
	struct uffd_range *range = uffd_table_find(engine->table, id);

	return range && range->engine == engine && range->start == id ? range : NULL;
}

int uffd_engine_set_ioctls(struct uffd_engine *engine, uint64_t id, uint64_t ioctls)
{
	unsigned int shard = uffd_table_enter(engine->table, current_cpu());
	struct uffd_range *range = own_range(engine, id);

	if (range)
		__atomic_store_n(&range->ioctls, ioctls, __ATOMIC_RELAXED);
	uffd_table_leave(engine->table, shard);
	return range ? 0 : -ENOENT;
}

int uffd_engine_remove(struct uffd_engine *engine, uint64_t id)
{
	unsigned int shard = uffd_table_enter(engine->table, current_cpu());
	struct uffd_range *range = own_range(engine, id);

	/* It stays allocated outside: nobody else takes this engine's ranges out. */
	uffd_table_leave(engine->table, shard);
	if (!range)
		return -ENOENT;
	uffd_table_remove(engine->table, range);
	free_range(range);
	return 0;
}

int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret)
{
	struct uffd_engine *engine = calloc(1, sizeof(*engine));
	void *zeros;

	*ret = NULL;
	if (!engine)
		return -ENOMEM;
	engine->options = *options;
	engine->wake_fd = -1;
	atomic_store(&engine->next_generation, 1);
	engine->shards = aligned_alloc(64, UFFD_SHARDS * sizeof(*engine->shards));
	engine->messages_capacity = FIRST_MESSAGES;
	engine->messages = malloc(FIRST_MESSAGES * sizeof(*engine->messages));
	zeros = mmap(NULL, ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (!engine->shards || !engine->messages || zeros == MAP_FAILED) {
		if (zeros != MAP_FAILED)
			munmap(zeros, ZEROS_SIZE);
		free(engine->messages);
		free(engine->shards);
		free(engine);
		return -ENOMEM;
	}
	memset(engine->shards, 0, UFFD_SHARDS * sizeof(*engine->shards));
	engine->zeros = zeros;
	if (options->is_inline) {
		engine->table = &uffd_inline_table;
	} else {
		engine->table = &engine->own_table;
		uffd_table_init(engine->table);
	}
	*ret = engine;
	return 0;
}

/* Every range has been taken out and the driver has stopped. */
void uffd_engine_destroy(struct uffd_engine *engine)
{
	const void *huge_zeros = atomic_load(&engine->huge_zeros);

	if (huge_zeros)
		munmap((void *)(uintptr_t)huge_zeros, HUGE_ZEROS_SIZE);
	munmap((void *)(uintptr_t)engine->zeros, ZEROS_SIZE);
	if (engine->table == &engine->own_table)
		uffd_table_deinit(engine->table);
	free(engine->deferred);
	free(engine->messages);
	free(engine->shards);
	free(engine);
}

/* Bookkeeping */

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

/* The smallest latency that does not belong to the bucket any more. */
uint64_t uffd_histogram_bound(uint32_t bucket)
{
	uint32_t exponent, sub;

	if (bucket < UFFD_HISTOGRAM_SUB)
		return bucket + 1;
	exponent = bucket / UFFD_HISTOGRAM_SUB + 2;
	sub = bucket % UFFD_HISTOGRAM_SUB;
	return (uint64_t)(UFFD_HISTOGRAM_SUB + sub + 1) << (exponent - 3);
}

void note_fault(struct uffd_engine *engine, uint64_t address, uint64_t flags,
		uint32_t thread_id, uint64_t began_ns)
{
	struct stats_shard *shard = &engine->shards[current_cpu() % UFFD_SHARDS];
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
}

void note_failure(struct uffd_engine *engine, uint64_t address, uint64_t length, int error,
		  enum uffd_failure_stage stage)
{
	count(engine, COUNTER(failed), 1);
	if (atomic_fetch_add(&engine->failures, 1))
		return;
	engine->failure.address = address;
	engine->failure.length = length;
	engine->failure.error = -error;
	engine->failure.stage = stage;
	atomic_store(&engine->failure_known, true);
}

void uffd_engine_failure(struct uffd_engine *engine, struct uffd_failure *failure_ret)
{
	*failure_ret = (struct uffd_failure){ 0 };
	if (atomic_load(&engine->failure_known)) {
		*failure_ret = engine->failure;
		failure_ret->count = atomic_load(&engine->failures);
	}
}

void uffd_engine_stats(struct uffd_engine *engine, struct uffd_stats *stats_ret)
{
	uint64_t *sums = (uint64_t *)stats_ret;

	memset(stats_ret, 0, sizeof(*stats_ret));
	for (size_t shard = 0; shard < UFFD_SHARDS; shard++)
		for (size_t i = 0; i < sizeof(*stats_ret) / sizeof(*sums); i++)
			sums[i] += atomic_load_explicit(&engine->shards[shard].counters[i],
							memory_order_relaxed);
}

static int newer_first(const void *a, const void *b)
{
	const struct uffd_recent_fault *left = a, *right = b;

	return (left->time_ns < right->time_ns) - (left->time_ns > right->time_ns);
}

uint32_t uffd_engine_recent(struct uffd_engine *engine, struct uffd_recent_fault *recent_ret,
			    uint32_t capacity)
{
	struct uffd_recent_fault *all;
	uint32_t found = 0;

	all = malloc(UFFD_SHARDS * RECENT_PER_SHARD * sizeof(*all));
	if (!all)
		return 0;
	for (size_t shard = 0; shard < UFFD_SHARDS; shard++) {
		for (size_t i = 0; i < RECENT_PER_SHARD; i++) {
			struct uffd_recent_fault *slot = &engine->shards[shard].recent[i];
			struct uffd_recent_fault *copy = &all[found];

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
	qsort(all, found, sizeof(*all), newer_first);
	if (found > capacity)
		found = capacity;
	memcpy(recent_ret, all, found * sizeof(*all));
	free(all);
	return found;
}

/* Putting pages in place */

static bool fills_page_cache(const struct uffd_range *range)
{
	return range->source != UFFD_SOURCE_NONE &&
	       (range->mode & UFFDIO_REGISTER_MODE_MINOR) &&
	       !(range->mode & UFFDIO_REGISTER_MODE_MISSING);
}

static uint64_t page_index(const struct uffd_range *range, uint64_t page)
{
	return (page - range->start) >> range->page_shift;
}

static _Atomic uint8_t *state_of(struct uffd_range *range, uint64_t page)
{
	return &range->state[page_index(range, page)];
}

static void set_states(struct uffd_range *range, uint64_t at, uint64_t end, uint8_t state)
{
	for (; at < end; at += range->page_size)
		atomic_store_explicit(state_of(range, at), state, memory_order_release);
}

static const void *zeros_for(struct uffd_engine *engine, uint64_t page_size)
{
	return page_size <= ZEROS_SIZE ? engine->zeros : atomic_load(&engine->huge_zeros);
}

/* Zeros, by COPY where ZEROPAGE is not to be had or cannot protect the page. */
static int put_zeros(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		     uint64_t length, uint64_t limit_ns, struct uffd_fill_result *result_ret)
{
	bool protect = range->mode & UFFDIO_REGISTER_MODE_WP;
	uint64_t ioctls = __atomic_load_n(&range->ioctls, __ATOMIC_RELAXED);
	bool by_copy = protect || !(ioctls & (UINT64_C(1) << _UFFDIO_ZEROPAGE));
	uint64_t step = !by_copy ? length : range->page_size > ZEROS_SIZE ? range->page_size
									  : ZEROS_SIZE;
	struct uffd_fill fill = {
		.fd = engine->options.fd,
		.op = by_copy ? UFFD_FILL_COPY : UFFD_FILL_ZERO,
		.src = (uint64_t)(uintptr_t)zeros_for(engine, range->page_size),
		.mode = protect ? UFFDIO_COPY_MODE_WP : 0,
		.page_size = range->page_size,
		.limit_ns = limit_ns,
	};
	int r = 0;

	*result_ret = (struct uffd_fill_result){ 0 };
	for (uint64_t done = 0; done < length && r == 0 && !result_ret->deferred; done += step) {
		struct uffd_fill_result part;

		fill.dst = at + done;
		fill.length = length - done < step ? length - done : step;
		r = uffd_fill_run(&fill, &part);
		result_ret->done += part.done;
		result_ret->already_present += part.already_present;
		if (part.deferred)
			result_ret->deferred = length - done - part.done - part.already_present;
	}
	return r;
}

/* A truncated file reads as zeros up to the end of its last page: look before copying. */
static bool file_covers(const struct uffd_range *range, uint64_t offset, uint64_t length)
{
	struct stat st;

	if (range->source != UFFD_SOURCE_FILE || range->source_sealed ||
	    offset >= range->source_length)
		return true;
	return fstat(range->source_fd, &st) == 0 &&
	       (uint64_t)st.st_size >= range->source_offset + offset + length;
}

static int put_copy(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		    uint64_t length, uint64_t limit_ns, struct uffd_fill_result *result_ret)
{
	uint64_t offset = at - range->start;
	bool in_tail = offset >= range->source_length;
	struct uffd_fill fill = {
		.fd = engine->options.fd,
		.op = UFFD_FILL_COPY,
		.dst = at,
		.src = in_tail ? (uint64_t)(uintptr_t)range->tail : range->source_address + offset,
		.length = length,
		.mode = range->mode & UFFDIO_REGISTER_MODE_WP ? UFFDIO_COPY_MODE_WP : 0,
		.page_size = range->page_size,
		.limit_ns = limit_ns,
	};
	int r;

	*result_ret = (struct uffd_fill_result){ 0 };
	if (!file_covers(range, offset, length))
		return -ENODATA;
	r = uffd_fill_run(&fill, result_ret);
	if (r == 0 && !file_covers(range, offset, length))
		note_failure(engine, at, length, -ENODATA, UFFD_FAILED_SOURCE);
	return r;
}

/* The source's content into the page cache, through the mapping that is not registered. */
static int write_page_cache(struct uffd_range *range, uint64_t at, uint64_t length)
{
	uint64_t offset = at - range->start;
	void *target = (void *)(uintptr_t)(range->local + offset);

	if (range->source == UFFD_SOURCE_ZERO) {
		memset(target, 0, length);
		return 0;
	}
	if (offset >= range->source_length) {
		memcpy(target, range->tail, length);
		return 0;
	}
	if (range->source == UFFD_SOURCE_FILE)
		return read_file_fully(range->source_fd, target, length,
				       range->source_offset + offset);
	memcpy(target, (void *)(uintptr_t)(range->source_address + offset), length);
	return 0;
}

static int put_continue(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
			uint64_t length, uint64_t limit_ns, struct uffd_fill_result *result_ret)
{
	struct uffd_fill fill = {
		.fd = engine->options.fd,
		.op = UFFD_FILL_CONTINUE,
		.dst = at,
		.length = length,
		.mode = range->mode & UFFDIO_REGISTER_MODE_WP ? UFFDIO_CONTINUE_MODE_WP : 0,
		.page_size = range->page_size,
		.limit_ns = limit_ns,
	};

	return uffd_fill_run(&fill, result_ret);
}

/* Absent pages [at, at + length), claimed by the caller; a run never crosses into the tail. */
static int put_content(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		       uint64_t length, enum uffd_fault_kind kind, uint64_t limit_ns,
		       struct uffd_fill_result *result_ret)
{
	int r = 0;

	*result_ret = (struct uffd_fill_result){ 0 };
	if (kind == UFFD_KIND_MINOR) {
		if (fills_page_cache(range))
			r = write_page_cache(range, at, length);
		return r ? r : put_continue(engine, range, at, length, limit_ns, result_ret);
	}
	if (range->source == UFFD_SOURCE_ZERO || range->source == UFFD_SOURCE_NONE)
		return put_zeros(engine, range, at, length, limit_ns, result_ret);
	return put_copy(engine, range, at, length, limit_ns, result_ret);
}

static int poison(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		  uint64_t length, struct uffd_fill_result *result_ret)
{
	struct uffd_fill fill = {
		.fd = engine->options.fd,
		.op = UFFD_FILL_POISON,
		.dst = at,
		.length = length,
		.page_size = range->page_size,
		.limit_ns = engine->options.retry_limit_ns,
	};
	int r = uffd_fill_run(&fill, result_ret);
	uint64_t poisoned = result_ret->done >> range->page_shift;

	if (poisoned)
		count(engine, COUNTER(poisoned_pages), poisoned);
	return r;
}

/* Resolving one page */

/* The page's content cannot be had: no zeros, ever. */
enum outcome apply_on_error(struct uffd_engine *engine, struct uffd_range *range, uint64_t page,
			    int error, enum uffd_failure_stage stage)
{
	struct uffd_fill_result result;
	uint8_t state = UFFD_PAGE_ABSENT;

	note_failure(engine, page, range->page_size, error, stage);
	if (engine->options.on_error == UFFD_ON_ERROR_KILL)
		kill(engine->options.owner_pid, SIGKILL);
	/* A page that is there (a write-protect fault) cannot be poisoned. */
	if (atomic_load(state_of(range, page)) == UFFD_PAGE_DIRTY)
		return OUTCOME_FAILED;
	if (engine->options.on_error == UFFD_ON_ERROR_POISON &&
	    poison(engine, range, page, range->page_size, &result) == 0 && !result.deferred)
		state = result.done ? UFFD_PAGE_POISONED : UFFD_PAGE_CLEAN;
	atomic_store(state_of(range, page), state);
	return OUTCOME_FAILED;
}

/* Take a page for ourselves; false when somebody else is at it. `was_ret`: its state before. */
static bool claim(struct uffd_range *range, uint64_t page, uint8_t *was_ret)
{
	_Atomic uint8_t *state = state_of(range, page);

	*was_ret = atomic_load_explicit(state, memory_order_acquire);
	do {
		if (*was_ret == UFFD_PAGE_IN_FLIGHT)
			return false;
	} while (!atomic_compare_exchange_weak(state, was_ret, UFFD_PAGE_IN_FLIGHT));
	return true;
}

/* Give a page back unchanged, and let those who waited for us ask again. */
static void unclaim(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		    uint64_t end, uint8_t state)
{
	set_states(range, at, end, state);
	if (at < end)
		uffd_shim_wake(engine->options.fd, at, end - at);
}

static enum outcome gone(struct uffd_engine *engine, int error)
{
	if (error == -ESRCH)
		atomic_store(&engine->owner_gone, true);
	count(engine, COUNTER(layout_changed), 1);
	return OUTCOME_GONE;
}

static enum outcome resolve_absence(struct uffd_engine *engine, struct uffd_range *range,
				    uint64_t page, enum uffd_fault_kind kind)
{
	struct uffd_fill_result result;
	uint8_t was;
	int r;

	if (!claim(range, page, &was))
		return OUTCOME_IN_FLIGHT;
	if (was == UFFD_PAGE_ABSENT && atomic_load(&engine->refusing) &&
	    (kind == UFFD_KIND_MISSING || fills_page_cache(range)) &&
	    range->source != UFFD_SOURCE_ZERO) {
		r = poison(engine, range, page, range->page_size, &result);
		atomic_store(state_of(range, page),
			     r == 0 && result.done ? UFFD_PAGE_POISONED : was);
		return OUTCOME_FAILED;
	}
	if (was == UFFD_PAGE_ABSENT)
		r = put_content(engine, range, page, range->page_size, kind, 0, &result);
	else if (kind == UFFD_KIND_MINOR)
		r = put_continue(engine, range, page, range->page_size, 0, &result);
	else
		/* It was here once: dropped since, or this is an old message (EEXIST). */
		r = put_zeros(engine, range, page, range->page_size, 0, &result);

	if (r == 0 && result.done) {
		count(engine, COUNTER(filled_pages), 1);
		atomic_store(state_of(range, page),
			     was == UFFD_PAGE_ABSENT || kind == UFFD_KIND_MINOR
				     ? UFFD_PAGE_CLEAN : UFFD_PAGE_REMOVED);
		return OUTCOME_RESOLVED;
	}
	if (r == 0 && result.already_present) {
		count(engine, COUNTER(already_present), 1);
		atomic_store(state_of(range, page),
			     was == UFFD_PAGE_ABSENT ? UFFD_PAGE_CLEAN : was);
		return OUTCOME_PRESENT;
	}
	if (r == 0 || r == -ENOMEM) {
		atomic_store(state_of(range, page), was);
		return OUTCOME_DEFER;
	}
	if (r == -ENOENT || r == -ESRCH || (r == -EFAULT && kind == UFFD_KIND_MINOR)) {
		unclaim(engine, range, page, page + range->page_size, was);
		return gone(engine, r);
	}
	return apply_on_error(engine, range, page, r,
			      r == -EFAULT || r == -ENODATA || r == -EIO ? UFFD_FAILED_SOURCE
									 : UFFD_FAILED_RESOLVE);
}

static const void *readable_copy(const struct uffd_range *range, uint64_t at)
{
	uint64_t address = range->local ? range->local + (at - range->start) : at;

	return (const void *)(uintptr_t)address;
}

/* Old content out, while the protection still holds. */
static void save_pages(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		       uint64_t length)
{
	memcpy((void *)(uintptr_t)(range->preserve + (at - range->start)),
	       readable_copy(range, at), length);
	count(engine, COUNTER(preserved_pages), length >> range->page_shift);
}

static enum outcome resolve_write_protect(struct uffd_engine *engine, struct uffd_range *range,
					  uint64_t page)
{
	uint8_t was;
	int r;

	if (!claim(range, page, &was))
		return OUTCOME_IN_FLIGHT;
	if (range->preserve && was != UFFD_PAGE_DIRTY && was != UFFD_PAGE_SAVED)
		save_pages(engine, range, page, range->page_size);
	/* Dirty before it can be written, so that no reader of the states misses it. */
	atomic_store(state_of(range, page), UFFD_PAGE_DIRTY);
	r = uffd_shim_writeprotect(engine->options.fd, page, range->page_size, 0);
	if (r == 0)
		return OUTCOME_RESOLVED;
	if (r == -EAGAIN || r == -ENOMEM)
		return OUTCOME_DEFER;
	if (r == -ENOENT || r == -ESRCH)
		return gone(engine, r);
	return apply_on_error(engine, range, page, r, UFFD_FAILED_RESOLVE);
}

enum outcome resolve_page(struct uffd_engine *engine, struct uffd_range *range, uint64_t page,
			  enum uffd_fault_kind kind)
{
	if (kind == UFFD_KIND_WP)
		return resolve_write_protect(engine, range, page);
	return resolve_absence(engine, range, page, kind);
}

/* Filling more than what was asked for */

uint64_t fill_absent(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
		     uint64_t end, enum uffd_fault_kind kind, uint64_t limit_ns,
		     int *error_ret, uint64_t *filled_ret)
{
	uint64_t tail_at = range->start + range->source_length;
	struct uffd_fill_result result;
	uint64_t stop, past;
	uint8_t expected;
	int r;

	*error_ret = 0;
	*filled_ret = 0;
	for (; at < end; at += range->page_size) {
		expected = UFFD_PAGE_ABSENT;
		if (atomic_compare_exchange_strong(state_of(range, at), &expected,
						   UFFD_PAGE_IN_FLIGHT))
			break;
	}
	if (at >= end)
		return end;
	if (range->tail && at < tail_at && tail_at < end)
		end = tail_at;
	for (stop = at + range->page_size; stop < end; stop += range->page_size) {
		expected = UFFD_PAGE_ABSENT;
		if (!atomic_compare_exchange_strong(state_of(range, stop), &expected,
						    UFFD_PAGE_IN_FLIGHT))
			break;
	}
	r = put_content(engine, range, at, stop - at, kind, limit_ns, &result);
	past = at + result.done + result.already_present;
	set_states(range, at, past, UFFD_PAGE_CLEAN);
	unclaim(engine, range, past, stop, UFFD_PAGE_ABSENT);
	count(engine, COUNTER(filled_pages), result.done >> range->page_shift);
	*filled_ret = result.done;
	if (r == -ESRCH)
		atomic_store(&engine->owner_gone, true);
	*error_ret = r ? r : result.deferred ? -EAGAIN : 0;
	return past;
}

void prefetch_span(struct uffd_engine *engine, struct uffd_range *range, uint64_t page,
		   uint64_t *from_ret, uint64_t *to_ret)
{
	uint64_t chunk = engine->options.prefetch;
	uint64_t from = range->start + (page - range->start) / chunk * chunk;
	uint32_t chunks = 1;
	uint64_t to;

	if (page == atomic_load_explicit(&range->readahead_at, memory_order_relaxed)) {
		chunks = 2 * atomic_load_explicit(&range->readahead_chunks, memory_order_relaxed);
		if (chunks < 1)
			chunks = 1;
		if (chunks > READAHEAD_MAX_CHUNKS)
			chunks = READAHEAD_MAX_CHUNKS;
	}
	to = range->end - from > chunks * chunk ? from + chunks * chunk : range->end;
	/* Whole pages, also where the chunk is smaller than one. */
	from = range->start + ((from - range->start) & ~(range->page_size - 1));
	to = range->start + ((to - range->start + range->page_size - 1) & ~(range->page_size - 1));
	atomic_store_explicit(&range->readahead_chunks, chunks, memory_order_relaxed);
	atomic_store_explicit(&range->readahead_at, to, memory_order_relaxed);
	*from_ret = from;
	*to_ret = to;
}

static void push_job(struct uffd_engine *engine, uint64_t at, uint64_t end,
		     enum uffd_fault_kind kind)
{
	if (at >= end)
		return;
	if (engine->job_count == PREFETCH_JOBS) {
		/* The oldest guess is the worst one. */
		memmove(&engine->jobs[0], &engine->jobs[1],
			(PREFETCH_JOBS - 1) * sizeof(engine->jobs[0]));
		engine->job_count--;
	}
	engine->jobs[engine->job_count++] = (struct prefetch_job){ at, end, kind };
}

static void plan_prefetch(struct uffd_engine *engine, struct uffd_range *range, uint64_t page,
			  enum uffd_fault_kind kind)
{
	uint64_t from, to;

	if (!engine->options.prefetch || kind == UFFD_KIND_WP)
		return;
	for (size_t i = 0; i < engine->job_count; i++)
		if (page >= engine->jobs[i].at && page < engine->jobs[i].end)
			return;
	prefetch_span(engine, range, page, &from, &to);
	push_job(engine, from, page, kind);
	push_job(engine, page + range->page_size, to, kind);
}

bool run_prefetch_slice(struct uffd_engine *engine)
{
	struct prefetch_job *job;
	struct uffd_range *range;
	unsigned int shard;
	uint64_t filled, slice_end;
	int error;

	if (!engine->job_count)
		return false;
	job = &engine->jobs[engine->job_count - 1];
	shard = uffd_table_enter(engine->table, current_cpu());
	range = uffd_table_find(engine->table, job->at);
	if (!range || job->end > range->end || atomic_load(&engine->refusing)) {
		engine->job_count--;
	} else {
		slice_end = job->at + (PREFETCH_SLICE > range->page_size ? PREFETCH_SLICE
									 : range->page_size);
		if (slice_end > job->end)
			slice_end = job->end;
		job->at = fill_absent(engine, range, job->at, slice_end, job->kind, 0, &error,
				      &filled);
		count(engine, COUNTER(prefetched_pages), filled >> range->page_shift);
		/* A page that cannot be had now is left to its own fault. */
		if (error || job->at >= job->end)
			engine->job_count--;
	}
	uffd_table_leave(engine->table, shard);
	return true;
}

static enum uffd_fault_kind filling_kind(const struct uffd_range *range)
{
	return range->mode & UFFDIO_REGISTER_MODE_MISSING ? UFFD_KIND_MISSING : UFFD_KIND_MINOR;
}

static bool can_be_absent(const struct uffd_range *range)
{
	return range->mode & (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
}

int uffd_engine_populate(struct uffd_engine *engine, uint64_t id, uint64_t offset,
			 uint64_t length, uint64_t *filled_ret)
{
	unsigned int shard = uffd_table_enter(engine->table, current_cpu());
	struct uffd_range *range = own_range(engine, id);
	uint64_t at, end, filled, slice;
	int error = range ? 0 : -ENOENT;

	*filled_ret = 0;
	if (range && can_be_absent(range)) {
		at = range->start + offset;
		end = at + length;
		slice = BULK_SLICE > range->page_size ? BULK_SLICE : range->page_size;
		while (at < end && !error) {
			at = fill_absent(engine, range, at, end - at > slice ? at + slice : end,
					 filling_kind(range), engine->options.retry_limit_ns,
					 &error, &filled);
			*filled_ret += filled;
		}
	}
	uffd_table_leave(engine->table, shard);
	return error;
}

static int unprotect(struct uffd_engine *engine, uint64_t at, uint64_t length)
{
	uint64_t give_up = uffd_now_ns() + engine->options.retry_limit_ns;
	int r;

	while ((r = uffd_shim_writeprotect(engine->options.fd, at, length, 0)) == -EAGAIN &&
	       uffd_now_ns() < give_up)
		sched_yield();
	return r;
}

static int preserve_range(struct uffd_engine *engine, struct uffd_range *range, uint64_t at,
			  uint64_t end, uint64_t *saved_ret)
{
	uint64_t slice = PREFETCH_SLICE > range->page_size ? PREFETCH_SLICE : range->page_size;
	int r = 0;

	while (at < end && r == 0) {
		uint64_t stop = at;
		uint8_t expected = UFFD_PAGE_CLEAN;

		while (stop < end && stop - at < slice &&
		       atomic_compare_exchange_strong(state_of(range, stop), &expected,
						      UFFD_PAGE_IN_FLIGHT))
			stop += range->page_size;
		if (stop == at) {
			at += range->page_size;
			continue;
		}
		save_pages(engine, range, at, stop - at);
		set_states(range, at, stop, UFFD_PAGE_SAVED);
		r = unprotect(engine, at, stop - at);
		*saved_ret += stop - at;
		at = stop;
	}
	return r;
}

int uffd_engine_preserve(struct uffd_engine *engine, uint64_t id, uint64_t offset,
			 uint64_t length, uint64_t *saved_ret)
{
	unsigned int shard = uffd_table_enter(engine->table, current_cpu());
	struct uffd_range *range = own_range(engine, id);
	int r = -ENOENT;

	*saved_ret = 0;
	if (range && !range->preserve)
		r = -EINVAL;
	else if (range)
		r = preserve_range(engine, range, range->start + offset,
				   range->start + offset + length, saved_ret);
	uffd_table_leave(engine->table, shard);
	return r;
}

static int poison_absent(struct uffd_engine *engine, struct uffd_range *range)
{
	uint64_t at = range->start;
	int r = 0;

	while (at < range->end && r == 0) {
		uint8_t expected = UFFD_PAGE_ABSENT;
		struct uffd_fill_result result;
		uint64_t stop = at, poisoned_end;

		while (stop < range->end && stop - at < BULK_SLICE &&
		       atomic_compare_exchange_strong(state_of(range, stop), &expected,
						      UFFD_PAGE_IN_FLIGHT))
			stop += range->page_size;
		if (stop == at) {
			at += range->page_size;
			continue;
		}
		r = poison(engine, range, at, stop - at, &result);
		poisoned_end = at + result.done + result.already_present;
		set_states(range, at, poisoned_end, UFFD_PAGE_POISONED);
		unclaim(engine, range, poisoned_end, stop, UFFD_PAGE_ABSENT);
		if (r == 0 && result.deferred)
			r = -EAGAIN;
		at = stop;
	}
	return r;
}

int uffd_engine_seal(struct uffd_engine *engine, uint64_t id)
{
	unsigned int shard = uffd_table_enter(engine->table, current_cpu());
	struct uffd_range *range = own_range(engine, id);
	bool loses_content = false, can_poison = false;
	uint64_t ignored = 0;
	int r = range ? 0 : -ENOENT;

	if (range) {
		uint64_t ioctls = __atomic_load_n(&range->ioctls, __ATOMIC_RELAXED);

		loses_content = can_be_absent(range) && range->source != UFFD_SOURCE_ZERO &&
				range->source != UFFD_SOURCE_NONE;
		can_poison = ioctls & (UINT64_C(1) << _UFFDIO_POISON);
	}
	if (range && range->preserve)
		r = preserve_range(engine, range, range->start, range->end, &ignored);
	if (r == 0 && range && range->mode & UFFDIO_REGISTER_MODE_WP)
		r = unprotect(engine, range->start, range->end - range->start);
	if (r == 0 && loses_content && can_poison)
		r = poison_absent(engine, range);
	uffd_table_leave(engine->table, shard);
	if (r == 0 && loses_content && !can_poison)
		r = uffd_engine_populate(engine, id, 0, range->end - range->start, &ignored);
	return r;
}

void uffd_engine_refuse(struct uffd_engine *engine)
{
	atomic_store(&engine->refusing, true);
}

static int copy_states(struct uffd_engine *engine, uint64_t id, uint64_t first_page,
		       uint64_t pages, uint8_t *out, const uint8_t *value)
{
	unsigned int shard = uffd_table_enter(engine->table, current_cpu());
	struct uffd_range *range = own_range(engine, id);
	int r = range ? 0 : -ENOENT;

	if (range && first_page + pages > (range->end - range->start) >> range->page_shift)
		r = -EINVAL;
	for (uint64_t i = 0; r == 0 && i < pages; i++) {
		if (out)
			out[i] = atomic_load_explicit(&range->state[first_page + i],
						      memory_order_acquire);
		else
			atomic_store(&range->state[first_page + i], *value);
	}
	uffd_table_leave(engine->table, shard);
	return r;
}

int uffd_engine_states(struct uffd_engine *engine, uint64_t id, uint64_t first_page,
		       uint64_t pages, uint8_t *states_ret)
{
	return copy_states(engine, id, first_page, pages, states_ret, NULL);
}

int uffd_engine_set_states(struct uffd_engine *engine, uint64_t id, uint64_t first_page,
			   uint64_t pages, uint32_t state)
{
	uint8_t value = (uint8_t)state;

	return copy_states(engine, id, first_page, pages, NULL, &value);
}

/* The step */

/* A registered range that nobody serves: its threads would wait for ever. */
static void refuse_unserved(struct uffd_engine *engine, uint64_t address)
{
	static const uint64_t sizes[] = { BASE_PAGE, 2u << 20, 1u << 30 };
	struct uffd_range stranger = { .page_shift = 12, .page_size = BASE_PAGE };
	struct uffd_fill_result result;
	int r = -EINVAL;

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]) && r == -EINVAL; i++) {
		stranger.page_size = sizes[i];
		r = poison(engine, &stranger, address & ~(sizes[i] - 1), sizes[i], &result);
	}
	if (r == -ENOENT || r == -ESRCH) {
		/* Unregistered since the fault was sent, which woke its threads. */
		gone(engine, r);
		return;
	}
	count(engine, COUNTER(unserved), 1);
	note_failure(engine, address, 0, r, UFFD_FAILED_UNSERVED);
}

static void defer(struct uffd_engine *engine, const struct deferred_fault *fault)
{
	for (size_t i = 0; i < engine->deferred_count; i++)
		if (engine->deferred[i].address == fault->address &&
		    fault_kind(engine->deferred[i].flags) == fault_kind(fault->flags))
			return;
	if (engine->deferred_count == engine->deferred_capacity) {
		size_t capacity = engine->deferred_capacity ? 2 * engine->deferred_capacity : 64;
		struct deferred_fault *larger =
			realloc(engine->deferred, capacity * sizeof(*larger));

		if (!larger) {
			/* Cannot remember it, so let the kernel send it again. */
			uffd_shim_wake(engine->options.fd, fault->address & ~(BASE_PAGE - 1ull),
				       BASE_PAGE);
			return;
		}
		engine->deferred = larger;
		engine->deferred_capacity = capacity;
	}
	engine->deferred[engine->deferred_count++] = *fault;
}

/* Returns false when it must be tried again later. */
static bool handle_fault(struct uffd_engine *engine, const struct deferred_fault *fault,
			 bool last_try)
{
	unsigned int shard = uffd_table_enter(engine->table, current_cpu());
	struct uffd_range *range = uffd_table_find(engine->table, fault->address);
	enum uffd_fault_kind kind = fault_kind(fault->flags);
	enum outcome outcome = OUTCOME_GONE;
	uint64_t page;

	if (range) {
		page = range->start +
		       ((fault->address - range->start) & ~(range->page_size - 1));
		outcome = resolve_page(engine, range, page, kind);
		if (outcome == OUTCOME_RESOLVED)
			plan_prefetch(engine, range, page, kind);
		if (outcome == OUTCOME_DEFER && last_try)
			outcome = apply_on_error(engine, range, page, -EAGAIN,
						 UFFD_FAILED_RESOLVE);
	} else {
		refuse_unserved(engine, fault->address);
	}
	uffd_table_leave(engine->table, shard);
	if (outcome == OUTCOME_RESOLVED)
		note_fault(engine, fault->address, fault->flags, fault->thread_id,
			   fault->since_ns);
	return outcome != OUTCOME_DEFER;
}

void retry_deferred(struct uffd_engine *engine)
{
	uint64_t now = uffd_now_ns();
	size_t kept = 0;

	for (size_t i = 0; i < engine->deferred_count; i++) {
		struct deferred_fault fault = engine->deferred[i];
		bool last_try = now - fault.since_ns > engine->options.retry_limit_ns;

		count(engine, COUNTER(retried), 1);
		if (!handle_fault(engine, &fault, last_try))
			engine->deferred[kept++] = fault;
	}
	engine->deferred_count = kept;
}

/* Read until the queue is empty; a short read says that it is. */
static int64_t drain(struct uffd_engine *engine)
{
	size_t queued = 0;

	for (;;) {
		size_t room = engine->messages_capacity - queued;
		int64_t n = uffd_shim_read(engine->options.fd, &engine->messages[queued],
					   room * sizeof(*engine->messages));
		struct uffd_msg *larger;

		if (n == -EAGAIN)
			return (int64_t)queued;
		if (n < 0)
			return n;
		queued += (uint64_t)n / sizeof(*engine->messages);
		if (queued < engine->messages_capacity)
			return (int64_t)queued;
		larger = realloc(engine->messages, 2 * queued * sizeof(*larger));
		if (!larger)
			return (int64_t)queued;
		engine->messages = larger;
		engine->messages_capacity = 2 * queued;
	}
}

/*
 * A layout event that the features of this userfaultfd do not ask for.  Its
 * sender is free to go on once the event is read.
 */
static void apply_layout_event(struct uffd_engine *engine, const struct uffd_msg *message)
{
	count(engine, COUNTER(layout_events), 1);
	note_failure(engine, 0, 0, -EPROTO, UFFD_FAILED_LAYOUT);
	if (message->event == UFFD_EVENT_FORK)
		close((int)message->arg.fork.ufd);
}

int uffd_engine_step(struct uffd_engine *engine, uint32_t *handled_ret)
{
	int64_t queued = drain(engine);
	uint64_t now;

	*handled_ret = 0;
	if (queued <= 0)
		return (int)queued;
	now = uffd_now_ns();
	/* Layout events first: a fault may be read before the event that it comes after. */
	for (int64_t i = 0; i < queued; i++)
		if (engine->messages[i].event != UFFD_EVENT_PAGEFAULT)
			apply_layout_event(engine, &engine->messages[i]);
	for (int64_t i = 0; i < queued; i++) {
		const struct uffd_msg *message = &engine->messages[i];
		struct deferred_fault fault = {
			.address = message->arg.pagefault.address,
			.flags = message->arg.pagefault.flags,
			.since_ns = now,
			.thread_id = message->arg.pagefault.ptid,
		};

		if (message->event != UFFD_EVENT_PAGEFAULT)
			continue;
		if (!handle_fault(engine, &fault, false)) {
			count(engine, COUNTER(deferred), 1);
			defer(engine, &fault);
		}
	}
	count(engine, COUNTER(messages), (uint64_t)queued);
	*handled_ret = (uint32_t)queued;
	return 0;
}
