// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdnoreturn.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "expected.h"
#include "gate.h"
#include "layout.h"
#include "space.h"
#include "spaces.h"
#include "stats.h"
#include "successor.h"
#include "base/poll.h"

int uffd_keeper_follow_parent(int32_t parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		return -errno;
	/* If the parent ended before the prctl, no signal comes. */
	return getppid() == parent ? 0 : -ESRCH;
}

/* This keeps the worker's sockets open; when it ends, shut them down so that the keeper notices. */
static noreturn void hold(int32_t keeper, int32_t worker, const int32_t *sockets, uint32_t count)
{
	struct pollfd ended = { .events = POLLIN };

	prctl(PR_SET_NAME, "uffd-holder");
	ended.fd = (int)syscall(SYS_pidfd_open, worker, 0);
	if (ended.fd < 0 || uffd_keeper_follow_parent(keeper))
		_exit(1);
	while (uffd_poll(&ended, 1, -1) < 1)
		;
	for (uint32_t i = 0; i < count; i++)
		shutdown(sockets[i], SHUT_RDWR);
	for (;;)
		pause();
}

int uffd_keeper_hold_descriptors(void *shared, int32_t keeper, const int32_t *sockets,
				 uint32_t count)
{
	struct message_log *log = &((struct engine_shared *)shared)->log;
	int32_t worker = getpid();
	/* CLONE_PARENT_SETTID: the pid is stored before either process continues. */
	long pid = syscall(SYS_clone, CLONE_FILES | CLONE_PARENT | CLONE_PARENT_SETTID | SIGCHLD,
			   NULL, &log->holder, NULL, 0);

	if (pid < 0)
		return -errno;
	if (pid == 0)
		hold(keeper, worker, sockets, count);
	return 0;
}

static int take_from_holder(int32_t holder, int fd)
{
	int pidfd = (int)syscall(SYS_pidfd_open, holder, 0), r;

	if (pidfd < 0)
		return -errno;
	r = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
	if (r < 0)
		r = -errno;
	close(pidfd);
	return r;
}

int uffd_keeper_rescue_fork(void *shared, uint32_t *position)
{
	struct message_log *log = &((struct engine_shared *)shared)->log;

	while (*position < LOG_MESSAGES) {
		struct uffd_msg *message = &log->messages[(*position)++];
		int fd;

		if (message->event != UFFD_EVENT_FORK)
			continue;
		fd = take_from_holder(log->holder, (int)message->arg.fork.ufd);
		message->arg.fork.ufd = (uint32_t)fd;
		return fd == -ENOENT ? -EBADF : fd;
	}
	return -ENOENT;
}

void uffd_keeper_release_holder(void *shared)
{
	struct message_log *log = &((struct engine_shared *)shared)->log;

	if (!log->holder)
		return;
	kill(log->holder, SIGKILL);
	waitpid(log->holder, NULL, 0);
	log->holder = 0;
}

int uffd_engine_adopt_space(struct uffd_engine *engine, int fd, uint32_t is_fork,
			    uint32_t layout_events, int32_t owner_pid, uint32_t number)
{
	return space_add(engine, fd, is_fork, layout_events, owner_pid, number, &number);
}

uint64_t uffd_engine_shared_size(uint64_t fault_log)
{
	return sizeof(struct engine_shared) + fault_log_size(fault_log);
}

/*
 * Apply what a killed process had read but not applied.  It held the gate, so no page was
 * filled after the read.  `reported`: the last event that the keeper knows of, which was
 * applied but perhaps not erased.  Dropping pages twice is harmless.
 */
void uffd_engine_replay(struct uffd_engine *engine, uint64_t reported)
{
	struct message_log *log = &engine->shared->log;
	struct uffd_space *space = space_get(engine, atomic_load(&log->space));
	uint64_t first = atomic_load(&log->sequence);

	if (space && !gate_close(space)) {
		space_put(space);
		return;
	}
	for (size_t i = 0; i < LOG_MESSAGES; i++) {
		struct uffd_msg message = log->messages[i];

		if (!is_layout_event(&message))
			continue;
		if (space && first + i > reported) {
			engine->applying = first + i;
			/* The descriptor in the log is the keeper's, which closes it later. */
			if (message.event == UFFD_EVENT_FORK)
				message.arg.fork.ufd = (uint32_t)fcntl((int)message.arg.fork.ufd,
								       F_DUPFD_CLOEXEC, 0);
			apply_layout_event(space, &message);
		}
		erase_message(&log->messages[i]);
	}
	if (space) {
		gate_leave(space);
		space_put(space);
	}
}

int uffd_engine_expect_unmap(struct uffd_engine *engine, uint32_t number, uint64_t start,
			     uint64_t end)
{
	struct uffd_space *space = space_get(engine, number);

	if (!space)
		return -ESRCH;
	expect_unmap(space, start, end);
	space_put(space);
	return 0;
}
