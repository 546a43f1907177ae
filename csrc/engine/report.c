// SPDX-License-Identifier: MIT
/* Report changes to the keeper, so that a successor can continue from there. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "alloc.h"
#include "report.h"

/* Send all of it; an error means that the keeper is gone, and this process soon will be. */
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
		   const struct uffd_report_piece *pieces, const int *fds, size_t fd_count)
{
	int keeper = engine->options.keeper_fd;

	if (keeper < 0)
		return;
	pthread_mutex_lock(&engine->keeper_lock);
	send_fully(keeper, head, sizeof(*head), fds, fd_count);
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
		.is_left = range->is_left,
	};
}

void report_added(const struct uffd_range *range)
{
	struct uffd_report_piece piece = piece_of(range);
	struct uffd_report head = { UFFD_REPORT_ADDED, range->space->number, range->id, 1, 0 };

	report(range->space->engine, &head, &piece, NULL, 0);
}

void report_dropped(struct uffd_engine *engine, uint32_t space, uint64_t id)
{
	struct uffd_report head = { UFFD_REPORT_DROPPED, space, id, 0, 0 };

	report(engine, &head, NULL, NULL, 0);
}

/* Put all pieces of the space in one report: the keeper applies all of it or nothing. */
static void report_space(struct uffd_space *space, struct uffd_report *head, const int *fds,
			 size_t fd_count)
{
	size_t room = atomic_load(&space->table->count);
	struct uffd_report_piece *pieces;
	struct expected_unmap *expected;
	struct uffd_range *range;

	if (space->engine->options.keeper_fd < 0)
		return;
	for (expected = space->expected; expected; expected = expected->next)
		room++;
	pieces = uffd_alloc((room + 1) * sizeof(*pieces));
	for (range = pieces ? uffd_table_next(space->table, 0) : NULL;
	     range && head->count < room; range = uffd_table_next(space->table, range->end))
		pieces[head->count++] = piece_of(range);
	for (expected = pieces ? space->expected : NULL; expected && head->count < room;
	     expected = expected->next)
		pieces[head->count++] = (struct uffd_report_piece){
			.start = expected->start,
			.end = expected->end,
		};
	head->space = space->number;
	head->sequence = space->engine->applying;
	report(space->engine, head, pieces, fds, fd_count);
	uffd_free(pieces);
}

void report_pieces(struct uffd_space *space)
{
	struct uffd_report head = { .kind = UFFD_REPORT_PIECES };

	report_space(space, &head, NULL, 0);
}

void report_fork(struct uffd_space *child, int states_fd)
{
	struct uffd_report head = { .kind = UFFD_REPORT_FORK, .id = child->layout_events };
	int fds[] = { child->fd, states_fd };

	report_space(child, &head, fds, states_fd >= 0 ? 2 : 1);
}

void report_gone(struct uffd_space *space)
{
	struct uffd_report head = { .kind = UFFD_REPORT_GONE, .space = space->number };

	report(space->engine, &head, NULL, NULL, 0);
}

int report_states_file(struct uffd_space *parent)
{
	struct uffd_range *range;
	uint64_t length = 0;
	int fd;

	if (parent->engine->options.keeper_fd < 0)
		return -1;
	for (range = uffd_table_next(parent->table, 0); range;
	     range = uffd_table_next(parent->table, range->end))
		if (!range->content->shared)
			length += uffd_pages_file_length(range->pages->count);
	fd = memfd_create("uffd-states", MFD_CLOEXEC);
	if (fd >= 0 && ftruncate(fd, (off_t)length)) {
		close(fd);
		return -1;
	}
	return fd;
}
