// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/page.h"
#include "base/tasks.h"
#include "remote/unregister.h"
#include "snapshot/guard.h"
#include "uffd_shim.h"

#define STEP_NS 2000000
#define IDLE_MS 50
/* Each time a registered mapping moves just then. */
#define LIFTS_MOST 1000u
/* vm.mmap_min_addr, and where addresses end on every x86-64. */
#define WAKE_START 0x10000ull
#define WAKE_END ((1ull << 47) - BASE_PAGE)
#define SYS_CLOSE_RANGE 436 /* Linux 5.9; the build machine's headers may be older */

/* Answer what is unread; returns whether the layout has changed, and who did it waits no more. */
static bool drain(int uffd)
{
	struct uffd_msg messages[16];
	bool changed = false;
	int64_t n;

	while ((n = uffd_shim_read(uffd, messages, sizeof(messages))) > 0)
		for (uint64_t i = 0; i < (uint64_t)n / sizeof(*messages); i++)
			changed |= messages[i].event != UFFD_EVENT_PAGEFAULT;
	return changed;
}

static void lift(int uffd, int maps_fd)
{
	/* What moved while the mappings were read may be registered still. */
	for (unsigned int i = 0; i < LIFTS_MOST; i++) {
		uffd_unregister_mappings(uffd, maps_fd, 0, UFFD_ALL_MEMORY);
		/* Also threads whose page is elsewhere by now. */
		uffd_shim_wake(uffd, WAKE_START, WAKE_END - WAKE_START);
		if (!drain(uffd))
			break;
	}
}

void uffd_guard_lift(const struct uffd_guard *guard, int uffd)
{
	lift(uffd, guard->maps_fd);
}

/* In the child: a copy of the process with one thread, in which no lock may be taken. */
static void watch(struct uffd_guarded *shared, int uffd, int maps_fd, uint64_t limit_ns)
{
	uint64_t since = 0;

	for (;;) {
		struct pollfd ready = { .fd = uffd, .events = POLLIN };
		struct timespec step = { .tv_nsec = STEP_NS };
		uint64_t answered, now;

		/* A message that was read is not reported any more. */
		poll(&ready, 1, atomic_load(&shared->busy) ? 0 : IDLE_MS);
		if (!(ready.revents & POLLIN) && !atomic_load(&shared->busy)) {
			since = 0;
			continue;
		}
		/* Where many threads write, there always is one. */
		answered = atomic_load(&shared->answered_ns);
		now = uffd_now_ns();
		if (!since)
			since = now;
		else if (since < answered)
			since = answered;
		if (now - since > limit_ns) {
			atomic_store(&shared->ended, 1);
			lift(uffd, maps_fd);
			since = 0;
		}
		nanosleep(&step, NULL);
	}
}

static void close_others(int kept, int kept_too)
{
	unsigned int low = (unsigned int)(kept < kept_too ? kept : kept_too);
	unsigned int high = (unsigned int)(kept < kept_too ? kept_too : kept);

	if (low)
		syscall(SYS_CLOSE_RANGE, 0u, low - 1, 0u);
	if (high - low > 1)
		syscall(SYS_CLOSE_RANGE, low + 1, high - 1, 0u);
	syscall(SYS_CLOSE_RANGE, high + 1, ~0u, 0u);
}

static int open_maps(struct uffd_guard *guard, int32_t target)
{
	guard->maps_fd = uffd_task_open(target, "maps", 0);
	if (guard->maps_fd >= 0)
		guard->its_maps_fd = uffd_task_open(target, "maps", 0);
	if (guard->its_maps_fd >= 0)
		return 0;
	return errno == ENOENT ? -ESRCH : -errno;
}

static void free_all(struct uffd_guard *guard)
{
	if (guard->maps_fd >= 0)
		close(guard->maps_fd);
	if (guard->its_maps_fd >= 0)
		close(guard->its_maps_fd);
	if (guard->shared)
		munmap(guard->shared, sizeof(*guard->shared));
	*guard = (struct uffd_guard){ .maps_fd = -1, .its_maps_fd = -1 };
}

int uffd_guard_start(struct uffd_guard *guard, int uffd, int32_t target, uint64_t limit_ns)
{
	sigset_t all, before;
	pid_t parent = getpid();
	void *shared = mmap(NULL, sizeof(*guard->shared), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int ret = shared == MAP_FAILED ? -ENOMEM : 0;

	*guard = (struct uffd_guard){ .maps_fd = -1, .its_maps_fd = -1 };
	if (ret)
		return ret;
	guard->shared = shared;
	ret = open_maps(guard, target);
	if (ret) {
		free_all(guard);
		return ret;
	}
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	/* Without a signal at its end, so that the program's own waits do not see it. */
	guard->pid = (pid_t)syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
	ret = guard->pid < 0 ? -errno : 0;
	if (!guard->pid) {
		/* Signals of the terminal's process group are not for it. */
		setsid();
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(0);
		prctl(PR_SET_NAME, "uffd-guard");
		/* Its copies of other descriptors would outlive this process for a moment. */
		close_others(uffd, guard->its_maps_fd);
		watch(shared, uffd, guard->its_maps_fd, limit_ns);
	}
	sigprocmask(SIG_SETMASK, &before, NULL);
	if (ret)
		free_all(guard);
	return ret;
}

void uffd_guard_stop(struct uffd_guard *guard)
{
	if (!guard->shared)
		return;
	kill(guard->pid, SIGKILL);
	while (waitpid(guard->pid, NULL, __WCLONE) < 0 && errno == EINTR)
		;
	free_all(guard);
}
