// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/tasks.h"
#include "base/threads.h"
#include "gil.h"
#include "reads.h"
#include "waiters.h"
#include "watch.h"
#include "words.h"
#include "base/line.h"
#include "base/poll.h"

#define NS_PER_S	1000000000ull
/* How often to look: one poll(2) of each descriptor, and more only if a thread waits. */
#define PERIOD_NS	(NS_PER_S / 2)
#define LIMIT_NS	(2 * NS_PER_S)
/* While a process that was sent the descriptor lives: it may be busy. */
#define SENT_LIMIT_NS	(10 * NS_PER_S)
/* A page that takes longer to find is left out of the line: the thread gets too little CPU. */
#define SEARCH_LIMIT_NS	(4 * NS_PER_S)
#define WAITERS		16
#define STACK_SIZE	(96u << 10)
/* How long to wait for the thread's end: enough unless the machine is overloaded. */
#define PAUSE_LIMIT_NS	(NS_PER_S / 5)

enum kind {
	NOTHING,	/* no thread waits, or a reader is at work */
	UNREAD_FAULTS,
	UNREAD_EVENTS,
	READ_FAULTS,	/* not resolved, and the thread that read them waits for the GIL */
};

struct entry {
	struct uffd_watched watched;
	uint32_t reads;		/* the read counter at the last look */
	bool said;		/* a line about these waiters was written */
	uint64_t since_ns;
	enum kind kind;		/* what was found at the last look */
	uint32_t count;
	struct uffd_waiter waiters[WAITERS];
	struct uffd_gil_wait gil;	/* who waits for the GIL meanwhile */
};

/* All under the lock.  Do not call malloc: a thread that waits in fork(3) holds its locks. */
static struct watch {
	pthread_mutex_t lock;
	pthread_cond_t changed;		/* signals the thread, and the thread's end */
	struct entry *entries;
	uint32_t count, capacity;
	bool is_running, is_paused;
	int32_t thread_id;
} watch = { .lock = PTHREAD_MUTEX_INITIALIZER };

static _Atomic uint32_t watched_count;

static void init_locks(void)
{
	pthread_mutex_init(&watch.lock, NULL);
	uffd_cond_init(&watch.changed);
}

/* In the child of a fork: it has no such thread, and the entries are the parent's. */
static void forget_parent(void)
{
	init_locks();
	watch.count = 0;
	watch.is_running = watch.is_paused = false;
	atomic_store(&watched_count, 0);
}

static void init(void)
{
	init_locks();
	pthread_atfork(NULL, NULL, forget_parent);
	uffd_gil_init();
}

/* No thread waits any more. */
static void reset(struct entry *entry)
{
	entry->count = 0;
	entry->said = false;
}

/* The line */

static uint64_t limit_of(const struct entry *entry)
{
	int32_t sent_to = entry->watched.sent_to;

	return sent_to && !uffd_task_has_exited(sent_to) ? SENT_LIMIT_NS : LIMIT_NS;
}

static enum uffd_search find_page(const struct entry *entry, struct uffd_waiter *waiter)
{
	if (waiter->is_event)
		return UFFD_SEARCH_FOUND;
	return uffd_waiters_page(entry->watched.fd, entry->watched.owner_pid, waiter,
				 entry->watched.low, entry->watched.high);
}

static struct uffd_words_wait wait_of(const struct entry *entry, uint64_t now)
{
	int32_t gil = uffd_gil_is_stuck(&entry->gil) ? entry->gil.thread_id : 0;
	bool is_reader = gil && gil == uffd_reads_reader(entry->watched.fd);

	return (struct uffd_words_wait){
		(now - entry->since_ns) / NS_PER_S, entry->count - 1,
		is_reader ? UFFD_WORDS_READER : gil ? UFFD_WORDS_SOMEBODY : UFFD_WORDS_NO_GIL, gil
	};
}

/* A fault whose message was read: nothing may wake the thread, so its page is not looked for. */
static void say_was_read(struct entry *entry, uint64_t now)
{
	struct uffd_words_wait wait = wait_of(entry, now);
	struct uffd_line line = { .used = 0 };

	if (!uffd_line_can_write(entry->watched.say_fd))
		return;
	if (wait.gil != UFFD_WORDS_READER) {
		reset(entry);
		return;
	}
	uffd_words_put(&line, &entry->watched, &entry->waiters[0], UFFD_SEARCH_UNFINISHED, &wait);
	uffd_line_write(&line, entry->watched.say_fd);
	entry->said = true;
}

static void say(struct entry *entry, uint64_t now)
{
	bool searches_on = now - entry->since_ns < limit_of(entry) + SEARCH_LIMIT_NS;
	struct uffd_line line = { .used = 0 };
	bool is_unfinished = false;
	struct uffd_words_wait wait = wait_of(entry, now);

	if (!uffd_line_can_write(entry->watched.say_fd))
		return;
	for (uint32_t i = 0; i < entry->count && !is_unfinished && !entry->said; i++) {
		struct uffd_waiter *waiter = &entry->waiters[i];
		enum uffd_search search = find_page(entry, waiter);

		is_unfinished = search == UFFD_SEARCH_UNFINISHED && (searches_on || !waiter->high);
		if (search == UFFD_SEARCH_OTHER || is_unfinished)
			continue;
		uffd_words_put(&line, &entry->watched, waiter, search, &wait);
		uffd_line_write(&line, entry->watched.say_fd);
		entry->said = true;
	}
	if (!entry->said && !is_unfinished)
		entry->count = 0;
}

/* Looking */

/* Whether whoever read the faults is a thread of this process that waits for the GIL. */
static bool is_reader_without_gil(struct entry *entry)
{
	int32_t reader = uffd_reads_reader(entry->watched.fd);

	return reader && !entry->watched.owner_pid && !entry->watched.sent_to &&
	       uffd_gil_look(&entry->gil, reader, uffd_now_ns());
}

/*
 * What waits, if none was read since the last look.  If faults were read but not resolved, a
 * reader is at work, unless it cannot get the GIL.
 */
static enum kind look_for_messages(struct entry *entry)
{
	struct pollfd poll_fd = { .fd = entry->watched.fd, .events = POLLIN };
	struct uffd_fdinfo info;
	uint32_t now = uffd_reads_of(entry->watched.fd);
	bool is_same = entry->reads == now, has_messages;

	entry->reads = now;
	/* A blocking userfaultfd gives POLLERR, whether messages are queued or not. */
	has_messages = uffd_poll(&poll_fd, 1, 0) == 1 && poll_fd.revents & (POLLIN | POLLERR);
	if (!is_same || (!has_messages && !uffd_reads_reader(entry->watched.fd)))
		return NOTHING;
	if (uffd_waiters_fdinfo(entry->watched.fd, &info))
		return NOTHING;
	if (info.pending != info.waiting)
		return is_reader_without_gil(entry) ? READ_FAULTS : NOTHING;
	if (!has_messages)
		return NOTHING;
	if (!entry->watched.owner_pid)
		uffd_gil_look(&entry->gil, 0, uffd_now_ns());
	return info.pending ? UNREAD_FAULTS : UNREAD_EVENTS;
}

static bool has_waiter(const struct entry *entry, int32_t thread_id)
{
	for (uint32_t i = 0; i < entry->count; i++)
		if (entry->waiters[i].thread_id == thread_id)
			return true;
	return false;
}

static void add_waiters(struct entry *entry, bool is_event)
{
	struct uffd_waiter found[WAITERS];
	uint32_t count = uffd_waiters_find(entry->watched.owner_pid, found, WAITERS);

	for (uint32_t i = 0; i < count && entry->count < WAITERS; i++)
		if (found[i].is_event == is_event && !has_waiter(entry, found[i].thread_id))
			entry->waiters[entry->count++] = found[i];
}

/* Whether a search has begun: it wakes threads, which wait again once they have a CPU. */
static bool were_woken(const struct entry *entry)
{
	for (uint32_t i = 0; i < entry->count; i++)
		if (entry->waiters[i].high)
			return true;
	return false;
}

static void drop_continued(struct entry *entry, bool is_event)
{
	bool woken = were_woken(entry);
	uint32_t kept = 0;

	for (uint32_t i = 0; i < entry->count; i++)
		if (entry->waiters[i].is_event == is_event &&
		    uffd_waiters_is_same(entry->watched.owner_pid, &entry->waiters[i], woken))
			entry->waiters[kept++] = entry->waiters[i];
	entry->count = kept;
}

static bool is_searching(struct entry *entry)
{
	if (entry->said || !were_woken(entry))
		return false;
	drop_continued(entry, false);
	return entry->count;
}

static void look_at(struct entry *entry)
{
	uint64_t now = uffd_now_ns();
	enum kind kind = look_for_messages(entry);
	bool is_event = kind == UNREAD_EVENTS;

	if (kind == NOTHING) {
		if (!is_searching(entry))
			reset(entry);
		return;
	}
	/* A search has woken threads, whose messages were read then: it cannot continue. */
	if (kind != entry->kind && (kind == READ_FAULTS || entry->kind == READ_FAULTS))
		reset(entry);
	entry->kind = kind;
	drop_continued(entry, is_event);
	if (!entry->count) {
		reset(entry);
		entry->since_ns = now;
		add_waiters(entry, is_event);
	} else if (!entry->said && now - entry->since_ns >= limit_of(entry)) {
		if (kind == READ_FAULTS) {
			say_was_read(entry, now);
			return;
		}
		/* Those that came later, before a search wakes them. */
		if (!were_woken(entry))
			add_waiters(entry, is_event);
		say(entry, now);
	}
}

/* The thread */

static void wait_until(uint64_t when)
{
	struct timespec at = { (time_t)(when / NS_PER_S), (long)(when % NS_PER_S) };

	pthread_cond_timedwait(&watch.changed, &watch.lock, &at);
}

static void *watch_main(void *unused)
{
	uint64_t next = uffd_now_ns();

	(void)unused;
	pthread_mutex_lock(&watch.lock);
	watch.thread_id = (int32_t)syscall(SYS_gettid);
	while (watch.count && !watch.is_paused) {
		if (uffd_now_ns() < next) {
			wait_until(next);
			continue;
		}
		for (uint32_t i = 0; i < watch.count; i++)
			look_at(&watch.entries[i]);
		next = uffd_now_ns() + PERIOD_NS;
	}
	watch.is_running = false;
	pthread_cond_broadcast(&watch.changed);
	pthread_mutex_unlock(&watch.lock);
	return NULL;
}

static int create_thread(size_t stack_size)
{
	pthread_t thread;
	int r = uffd_thread_start_detached(&thread, stack_size, watch_main, NULL);

	/* The thread still exists: it waits for the lock, which we hold. */
	if (!r)
		pthread_setname_np(thread, "uffd-watch");
	return r;
}

static void start_thread(void)
{
	if (watch.is_running || watch.is_paused || !watch.count)
		return;
	/* EINVAL: the thread-local data of the program's libraries does not fit. */
	watch.is_running = !create_thread(STACK_SIZE + (size_t)PTHREAD_STACK_MIN) ||
			   !create_thread(0);
}

/* The list */

static struct entry *find(int fd)
{
	for (uint32_t i = 0; i < watch.count; i++)
		if (watch.entries[i].watched.fd == fd)
			return &watch.entries[i];
	return NULL;
}

static bool grow(void)
{
	size_t old_size = watch.capacity * sizeof(struct entry);
	size_t size = old_size ? 2 * old_size : 16384;
	void *larger;

	larger = old_size ? mremap(watch.entries, old_size, size, MREMAP_MAYMOVE)
			  : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
				 -1, 0);
	if (larger == MAP_FAILED)
		return false;
	watch.entries = larger;
	watch.capacity = (uint32_t)(size / sizeof(struct entry));
	return true;
}

static struct entry *add(int fd)
{
	struct entry *entry;

	if (watch.count == watch.capacity && !grow())
		return NULL;
	entry = &watch.entries[watch.count++];
	memset(entry, 0, sizeof(*entry));
	entry->reads = uffd_reads_of(fd);
	atomic_store(&watched_count, watch.count);
	return entry;
}

void uffd_watch_begin(const struct uffd_watched *watched)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct entry *entry;

	pthread_once(&once, init);
	if (watched->say_fd < 0)
		return;
	pthread_mutex_lock(&watch.lock);
	entry = find(watched->fd);
	if (!entry)
		entry = add(watched->fd);
	if (entry)
		entry->watched = *watched;
	start_thread();
	pthread_mutex_unlock(&watch.lock);
}

void uffd_watch_end(int fd)
{
	struct entry *entry;

	if (!atomic_load(&watched_count))
		return;
	pthread_mutex_lock(&watch.lock);
	entry = find(fd);
	if (entry) {
		*entry = watch.entries[--watch.count];
		atomic_store(&watched_count, watch.count);
		if (!watch.count)
			pthread_cond_broadcast(&watch.changed);
	}
	pthread_mutex_unlock(&watch.lock);
}

static bool waits_for_forks(void)
{
	for (uint32_t i = 0; i < watch.count; i++)
		if (watch.entries[i].watched.has_forks)
			return true;
	return false;
}

/* The thread has unlocked for the last time and exits in a moment. */
static void await_exit(uint64_t give_up)
{
	while (!syscall(SYS_tgkill, getpid(), watch.thread_id, 0) && uffd_now_ns() < give_up)
		sched_yield();
}

void uffd_watch_pause(void)
{
	uint64_t give_up = uffd_now_ns() + PAUSE_LIMIT_NS;

	if (!atomic_load(&watched_count))
		return;
	pthread_mutex_lock(&watch.lock);
	if (watch.is_running && !waits_for_forks()) {
		watch.is_paused = true;
		pthread_cond_broadcast(&watch.changed);
		while (watch.is_running && uffd_now_ns() < give_up)
			wait_until(give_up);
		if (!watch.is_running)
			await_exit(give_up);
	}
	pthread_mutex_unlock(&watch.lock);
}

void uffd_watch_resume(void)
{
	if (!atomic_load(&watched_count))
		return;
	pthread_mutex_lock(&watch.lock);
	watch.is_paused = false;
	start_thread();
	pthread_mutex_unlock(&watch.lock);
}
