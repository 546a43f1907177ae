// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "dirty/drops.h"
#include "dirty/ranges.h"
#include "uffd_abi.h"

#define RING 65536u /* a power of two */
#define STACK_BYTES 32768u
#define MESSAGES 32u
/* A reader that is stopped, or gets no CPU, does not stop a round. */
#define NOTED_NS 1000000000u
/* Linux 5.3 and 5.9; the build machine's headers may be older. */
#define SYS_PIDFD_OPEN 434
#define SYS_CLOSE_RANGE 436

struct uffd_drops {
	int uffd;
	/* The process that made it. */
	pid_t owner;
	pid_t reader;
	/* Closed by the end of this process and by an execve(2). */
	int life[2];
	/* Tells of this process's end even if a fork of it lives on. */
	int owner_pidfd;
	void *stack;
	/* The reader writes at `head`, this process reads at `tail`. */
	_Atomic uint64_t head;
	_Atomic uint64_t tail;
	/* Odd while events may have been read that are not noted yet. */
	_Atomic uint64_t turn;
	_Atomic uint32_t lost;
	struct {
		uint64_t start;
		uint64_t end;
	} ring[RING];
};

/*
 * In the reader: without a library's wrapper, since errno and thread-local storage are those of
 * the thread that made it.
 */
static inline __attribute__((always_inline)) long raw(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return result;
}

#define READER __attribute__((no_sanitize_address, no_sanitize_thread))

static READER void note(struct uffd_drops *drops, uint64_t start, uint64_t end)
{
	uint64_t head = atomic_load_explicit(&drops->head, memory_order_relaxed);

	if (head - atomic_load_explicit(&drops->tail, memory_order_acquire) == RING) {
		atomic_store(&drops->lost, 1);
		return;
	}
	drops->ring[head % RING].start = start;
	drops->ring[head % RING].end = end;
	atomic_store_explicit(&drops->head, head + 1, memory_order_release);
}

/* Close every descriptor but three. */
static READER void close_others(const struct uffd_drops *drops)
{
	int kept[3] = { drops->uffd, drops->life[0], drops->owner_pidfd };
	long from = 0;

	for (int i = 0; i < 3; i++) {
		for (int j = i + 1; j < 3; j++) {
			if (kept[j] < kept[i]) {
				int other = kept[i];

				kept[i] = kept[j];
				kept[j] = other;
			}
		}
		if (kept[i] > from)
			raw(SYS_CLOSE_RANGE, from, kept[i] - 1, 0);
		from = kept[i] + 1;
	}
	raw(SYS_CLOSE_RANGE, from, ~0u, 0);
}

static READER int read_events(void *argument)
{
	static const char name[] = "uffd-drops";
	struct uffd_drops *drops = argument;
	struct uffd_msg messages[MESSAGES];

	/* Signals of the terminal's process group are not for it. */
	raw(SYS_setsid, 0, 0, 0);
	raw(SYS_prctl, PR_SET_NAME, (long)name, 0);
	close_others(drops);
	for (;;) {
		struct pollfd polled[3] = {
			{ .fd = drops->uffd, .events = POLLIN },
			{ .fd = drops->life[0] },
			{ .fd = drops->owner_pidfd, .events = POLLIN },
		};
		long n = raw(SYS_poll, (long)polled, 3, -1);

		if (n == -EINTR)
			continue;
		if (n < 0 || polled[1].revents || polled[2].revents || polled[0].revents & ~POLLIN)
			raw(SYS_exit_group, 0, 0, 0);
		/* Reading lets the thread that drops go on: it may call uffd_drops_take() before note(). */
		atomic_fetch_add(&drops->turn, 1);
		n = raw(SYS_read, drops->uffd, (long)messages, sizeof(messages));
		for (long i = 0; i < n / (long)sizeof(*messages); i++) {
			const struct uffd_msg *at = &messages[i];

			if (at->event == UFFD_EVENT_REMOVE)
				note(drops, at->arg.remove.start, at->arg.remove.end);
			else if (at->event == UFFD_EVENT_FORK)
				raw(SYS_close, (long)at->arg.fork.ufd, 0, 0);
		}
		atomic_fetch_add(&drops->turn, 1);
	}
	return 0; /* not reached, which gcc does not see */
}

static int start(struct uffd_drops *drops)
{
	sigset_t all, before;

	/* One that was killed may have left it odd. */
	atomic_store(&drops->turn, 0);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	/* No signal at its end, so that the program's own waits do not see it. */
	drops->reader = clone(read_events, (char *)drops->stack + STACK_BYTES, CLONE_VM, drops);
	sigprocmask(SIG_SETMASK, &before, NULL);
	return drops->reader < 0 ? -errno : 0;
}

static void end(struct uffd_drops *drops)
{
	if (drops->reader <= 0)
		return;
	kill(drops->reader, SIGKILL);
	while (waitpid(drops->reader, NULL, __WCLONE) < 0 && errno == EINTR)
		;
}

static void destroy(struct uffd_drops *drops)
{
	if (drops->owner == getpid())
		end(drops);
	for (int i = 0; i < 2; i++) {
		if (drops->life[i] >= 0)
			close(drops->life[i]);
	}
	if (drops->owner_pidfd >= 0)
		close(drops->owner_pidfd);
	if (drops->stack)
		munmap(drops->stack, STACK_BYTES);
	munmap(drops, sizeof(*drops));
}

int uffd_drops_create(int uffd, struct uffd_drops **drops_ret)
{
	struct uffd_drops *drops = mmap(NULL, sizeof(*drops), PROT_READ | PROT_WRITE,
					MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int ret = 0;

	*drops_ret = NULL;
	if (drops == MAP_FAILED)
		return -errno;
	drops->uffd = uffd;
	drops->owner = getpid();
	drops->life[0] = drops->life[1] = drops->owner_pidfd = -1;
	drops->stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (drops->stack == MAP_FAILED) {
		drops->stack = NULL;
		ret = -errno;
	}
	if (!ret && pipe2(drops->life, O_CLOEXEC))
		ret = -errno;
	if (!ret) {
		drops->owner_pidfd = (int)syscall(SYS_PIDFD_OPEN, drops->owner, 0);
		if (drops->owner_pidfd < 0)
			ret = -errno;
	}
	if (!ret)
		ret = start(drops);
	if (ret)
		destroy(drops);
	else
		*drops_ret = drops;
	return ret;
}

static int by_start(const void *a, const void *b)
{
	const struct uffd_page_region *first = a, *second = b;

	return (first->start > second->start) - (first->start < second->start);
}

static bool has_ended(struct uffd_drops *drops)
{
	if (drops->reader > 0 &&
	    waitpid(drops->reader, NULL, WNOHANG | __WCLONE) == drops->reader)
		drops->reader = -1;
	return drops->reader <= 0;
}

/* Wait until all that the reader has read is noted; false if it does not get there. */
static bool is_all_noted(struct uffd_drops *drops)
{
	uint64_t turn = atomic_load(&drops->turn), limit = uffd_now_ns() + NOTED_NS;

	for (unsigned int attempt = 0; turn % 2 && atomic_load(&drops->turn) == turn; attempt++) {
		if (has_ended(drops) || uffd_now_ns() > limit)
			return false;
		uffd_back_off(attempt);
	}
	return true;
}

int uffd_drops_take(struct uffd_drops *drops, struct uffd_page_ranges *ranges_ret,
		    uint32_t *lost_ret)
{
	struct uffd_page_region *vec = NULL;
	uint64_t tail, head, count, reached = 0;
	int ret = 0;

	if (!is_all_noted(drops))
		atomic_store(&drops->lost, 1);
	tail = atomic_load_explicit(&drops->tail, memory_order_relaxed);
	head = atomic_load_explicit(&drops->head, memory_order_acquire);
	count = head - tail;
	/* Killed, or missing since another could not be started. */
	if (has_ended(drops)) {
		atomic_store(&drops->lost, 1);
		ret = start(drops);
	}
	if (!ret && count) {
		vec = calloc(count, sizeof(*vec));
		ret = vec ? 0 : -ENOMEM;
	}
	for (uint64_t i = 0; !ret && i < count; i++) {
		vec[i].start = drops->ring[(tail + i) % RING].start;
		vec[i].end = drops->ring[(tail + i) % RING].end;
	}
	if (vec)
		qsort(vec, count, sizeof(*vec), by_start);
	for (uint64_t i = 0; !ret && i < count; i++) {
		ret = uffd_ranges_append(ranges_ret, vec[i].start > reached ? vec[i].start : reached,
					 vec[i].end);
		if (vec[i].end > reached)
			reached = vec[i].end;
	}
	free(vec);
	/* After an error the next call has all of it again. */
	if (ret)
		return ret;
	*lost_ret = atomic_exchange(&drops->lost, 0);
	atomic_store_explicit(&drops->tail, head, memory_order_release);
	return 0;
}

void uffd_drops_destroy(struct uffd_drops **drops)
{
	if (*drops)
		destroy(*drops);
	*drops = NULL;
}
