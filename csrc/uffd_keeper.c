// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "uffd_alloc.h"
#include "uffd_engine_internal.h"

/* Whole, or not at all when the keeper is gone: then this process is about to be. */
static void send_fully(int keeper, const void *data, size_t length, const int *fds, size_t fd_count)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(2 * sizeof(int))];
	} control = { 0 };
	struct iovec part = { (void *)(uintptr_t)data, length };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (fd_count) {
		struct cmsghdr *header = &control.align;

		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(header), fds, fd_count * sizeof(int));
	}
	while (part.iov_len) {
		ssize_t n = sendmsg(keeper, &message, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return;
		part.iov_base = (char *)part.iov_base + n;
		part.iov_len -= (size_t)n;
		message.msg_control = NULL;
		message.msg_controllen = 0;
	}
}

static void report(struct uffd_engine *engine, const struct uffd_report *head,
		   const struct uffd_report_piece *pieces, int fd)
{
	int keeper = engine->options.keeper_fd;

	if (keeper < 0)
		return;
	pthread_mutex_lock(&engine->keeper_lock);
	send_fully(keeper, head, sizeof(*head), &fd, fd >= 0);
	send_fully(keeper, pieces, head->count * sizeof(*pieces), NULL, 0);
	pthread_mutex_unlock(&engine->keeper_lock);
}

static struct uffd_report_piece piece_of(const struct uffd_range *range)
{
	return (struct uffd_report_piece){
		.id = range->id,
		.start = range->start,
		.end = range->end,
		.origin = range->origin,
		.states_offset = range->pages->states_offset,
	};
}

void report_added(const struct uffd_range *range)
{
	struct uffd_report_piece piece = piece_of(range);
	struct uffd_report head = { UFFD_REPORT_ADDED, range->space->number, range->id, 1 };

	report(range->space->engine, &head, &piece, -1);
}

void report_dropped(struct uffd_engine *engine, uint32_t space, uint64_t id)
{
	struct uffd_report head = { UFFD_REPORT_DROPPED, space, id, 0 };

	report(engine, &head, NULL, -1);
}

void report_pieces(struct uffd_space *space, int states_fd)
{
	struct uffd_report head = { .kind = UFFD_REPORT_PIECES, .space = space->number };
	struct uffd_report_piece *pieces;
	struct uffd_range *range;
	size_t count = atomic_load(&space->table->count);

	if (space->engine->options.keeper_fd < 0)
		return;
	pieces = uffd_alloc((count + 1) * sizeof(*pieces));
	if (!pieces)
		return;
	for (range = uffd_table_next(space->table, 0); range && head.count < count;
	     range = uffd_table_next(space->table, range->end))
		pieces[head.count++] = piece_of(range);
	report(space->engine, &head, pieces, states_fd);
	uffd_free(pieces);
}

void report_fork(struct uffd_space *child)
{
	struct uffd_report head = {
		UFFD_REPORT_FORK, child->number, child->event_features, 0
	};

	report(child->engine, &head, NULL, child->fd);
}

void report_gone(struct uffd_space *space)
{
	struct uffd_report head = { .kind = UFFD_REPORT_GONE, .space = space->number };

	report(space->engine, &head, NULL, -1);
}

int uffd_keeper_follow_parent(int32_t parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		return -errno;
	/* One that went before this is not signalled. */
	return getppid() == parent ? 0 : -ESRCH;
}
