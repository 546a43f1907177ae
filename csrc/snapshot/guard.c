// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "snapshot/guard.h"
#include "uffd_shim.h"

#define STEP_NS 2000000
#define IDLE_MS 50
#define SYS_CLOSE_RANGE 436 /* Linux 5.9; the build machine's headers may be older */

void uffd_guard_lift(const struct uffd_guarded *shared, int uffd)
{
	uint32_t count = atomic_load(&shared->count);
	struct uffd_msg messages[16];

	/*
	 * Unregistering memory that is registered for write-protection only wakes nobody (measured on
	 * Linux 6.18).  A range that is gone has nobody to wake.
	 */
	for (uint32_t i = 0; i < count; i++) {
		uint64_t start = shared->spans[i].start, length = shared->spans[i].end - start;

		uffd_shim_unregister(uffd, start, length);
		uffd_shim_wake(uffd, start, length);
	}
	/* A thread that changes the layout waits until its message is read. */
	while (uffd_shim_read(uffd, messages, sizeof(messages)) > 0)
		;
}

/* In the child: a copy of the process with one thread, in which no lock may be taken. */
static void watch(struct uffd_guarded *shared, int uffd, uint64_t limit_ns)
{
	uint64_t since = 0, beat = 0;

	for (;;) {
		struct pollfd ready = { .fd = uffd, .events = POLLIN };
		struct timespec step = { .tv_nsec = STEP_NS };
		uint64_t now;

		/* A message that was read is not reported any more. */
		poll(&ready, 1, atomic_load(&shared->busy) ? 0 : IDLE_MS);
		if (!(ready.revents & POLLIN) && !atomic_load(&shared->busy)) {
			since = 0;
			continue;
		}
		now = uffd_now_ns();
		if (!since || beat != atomic_load(&shared->beat)) {
			since = now;
			beat = atomic_load(&shared->beat);
		} else if (now - since > limit_ns) {
			atomic_store(&shared->ended, 1);
			uffd_guard_lift(shared, uffd);
			since = 0;
		}
		nanosleep(&step, NULL);
	}
}

int uffd_guard_start(struct uffd_guard *guard, int uffd, uint64_t limit_ns)
{
	sigset_t all, before;
	pid_t parent = getpid();
	void *shared = mmap(NULL, sizeof(*guard->shared), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	*guard = (struct uffd_guard){ 0 };
	if (shared == MAP_FAILED)
		return -ENOMEM;
	guard->shared = shared;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	/* Without a signal at its end, so that the program's own waits do not see it. */
	guard->pid = (pid_t)syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
	if (!guard->pid) {
		/* Signals of the terminal's process group are not for it. */
		setsid();
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(0);
		prctl(PR_SET_NAME, "uffd-guard");
		/* Its copies of other descriptors would outlive this process for a moment. */
		if (uffd)
			syscall(SYS_CLOSE_RANGE, 0u, (unsigned int)uffd - 1, 0u);
		syscall(SYS_CLOSE_RANGE, (unsigned int)uffd + 1, ~0u, 0u);
		watch(shared, uffd, limit_ns);
	}
	sigprocmask(SIG_SETMASK, &before, NULL);
	if (guard->pid < 0) {
		munmap(shared, sizeof(*guard->shared));
		guard->shared = NULL;
		return -errno;
	}
	return 0;
}

int uffd_guard_add(struct uffd_guard *guard, uint64_t start, uint64_t end)
{
	uint32_t count = atomic_load(&guard->shared->count);

	if (count && guard->shared->spans[count - 1].end == start) {
		guard->shared->spans[count - 1].end = end;
		return 0;
	}
	if (count == UFFD_GUARD_SPANS)
		return -E2BIG;
	guard->shared->spans[count].start = start;
	guard->shared->spans[count].end = end;
	atomic_store(&guard->shared->count, count + 1);
	return 0;
}

void uffd_guard_stop(struct uffd_guard *guard)
{
	if (!guard->shared)
		return;
	kill(guard->pid, SIGKILL);
	while (waitpid(guard->pid, NULL, __WCLONE) < 0 && errno == EINTR)
		;
	munmap(guard->shared, sizeof(*guard->shared));
	guard->shared = NULL;
}
