// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uffd_owned.h"
#include "uffd_shim.h"
#include "watch/reads.h"
#include "watch/watch.h"

/* Replaces the descriptor in a fork's message. */
#define TAKEN	UINT32_MAX
/* Linux 6.5 */
#ifndef SCM_PIDFD
#define SCM_PIDFD 0x04
#endif

/* Several threads may close or move one owner: only one of them gets the descriptor. */
static int32_t take(int32_t *fd)
{
	return __atomic_exchange_n(fd, -1, __ATOMIC_ACQ_REL);
}

static int keep(int fd, int32_t *fd_ret)
{
	if (fd < 0)
		return fd;
	*fd_ret = fd;
	return 0;
}

int uffd_owned_open(const char *path, int flags, uint32_t mode, int32_t *fd_ret)
{
	int fd = open(path, flags | O_CLOEXEC, mode);

	return keep(fd < 0 ? -errno : fd, fd_ret);
}

int uffd_owned_open_syscall(int flags, int32_t *fd_ret)
{
	return keep(uffd_shim_open_syscall(flags), fd_ret);
}

int uffd_owned_open_device(const char *path, int flags, int32_t *fd_ret)
{
	return keep(uffd_shim_open_device(path, flags), fd_ret);
}

int uffd_owned_memfd_create(const char *name, uint32_t flags, int32_t *fd_ret)
{
	return keep(uffd_shim_memfd_create(name, flags), fd_ret);
}

int uffd_owned_duplicate(int fd, int least, int32_t *fd_ret)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, least);

	return keep(copy < 0 ? -errno : copy, fd_ret);
}

int uffd_owned_eventfd(int32_t *fd_ret)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	return keep(fd < 0 ? -errno : fd, fd_ret);
}

/* With a number of at least `least`; `fd` is the caller's no longer. */
static int keep_above(int fd, int least, int32_t *fd_ret)
{
	int r;

	if (fd >= least)
		return keep(fd, fd_ret);
	r = uffd_owned_duplicate(fd, least, fd_ret);
	close(fd);
	return r;
}

int uffd_owned_pipe(int least, int32_t *read_ret, int32_t *write_ret)
{
	int ends[2], r, other;

	if (pipe2(ends, O_CLOEXEC))
		return -errno;
	r = keep_above(ends[0], least, read_ret);
	other = keep_above(ends[1], least, write_ret);
	return r ? r : other;
}

int uffd_owned_pidfd_open(int32_t pid, int32_t *fd_ret)
{
	long fd = syscall(SYS_pidfd_open, pid, 0);

	return keep(fd < 0 ? -errno : (int)fd, fd_ret);
}

int uffd_owned_close(int32_t *fd)
{
	/* Linux frees the number whatever close(2) returns. */
	int number = take(fd);

	if (number >= 0)
		uffd_watch_end(number);
	return number >= 0 && close(number) ? -errno : 0;
}

int uffd_owned_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd,
		    uint64_t offset, struct uffd_mapping *mapping_ret)
{
	mapping_ret->length = length;
	return uffd_shim_mmap(address, length, prot, flags, fd, offset, &mapping_ret->start);
}

int uffd_owned_munmap(struct uffd_mapping *mapping)
{
	int r;

	/* `start` stays until the memory is unmapped: others look whether it is. */
	if (__atomic_exchange_n(&mapping->is_ending, 1, __ATOMIC_ACQUIRE))
		return 0; /* another thread is at it */
	r = mapping->start ? uffd_shim_munmap(mapping->start, mapping->length) : 0;
	if (!r)
		mapping->start = 0;
	__atomic_store_n(&mapping->is_ending, 0, __ATOMIC_RELEASE);
	return r;
}

void uffd_owned_move_mapping(struct uffd_mapping *from, struct uffd_mapping *mapping_ret)
{
	mapping_ret->start = from->start;
	mapping_ret->length = from->length;
	from->start = 0;
}

static char *take_path(struct uffd_name *name)
{
	return __atomic_exchange_n(&name->path, NULL, __ATOMIC_ACQ_REL);
}

int uffd_owned_name(const char *path, int fd, struct uffd_name *name_ret)
{
	struct stat status;

	free(take_path(name_ret));
	name_ret->pid = 0;
	if (fstat(fd, &status))
		return -errno;
	name_ret->path = strdup(path);
	if (!name_ret->path)
		return -ENOMEM;
	name_ret->device = status.st_dev;
	name_ret->inode = status.st_ino;
	return 0;
}

int uffd_owned_create(const char *path, int flags, uint32_t mode, int32_t *fd_ret,
		      struct uffd_name *name_ret)
{
	int r = uffd_owned_open(path, flags | O_CREAT | O_EXCL, mode, fd_ret);

	if (r)
		return r;
	r = uffd_owned_name(path, *fd_ret, name_ret);
	if (r)
		unlink(path);
	else
		name_ret->pid = getpid();
	return r;
}

int uffd_owned_unlink(struct uffd_name *name)
{
	char *path = take_path(name);
	struct stat status;
	int r = 0;

	if (path && name->pid == getpid() && !lstat(path, &status) &&
	    status.st_dev == name->device && status.st_ino == name->inode)
		r = unlink(path) && errno != ENOENT ? -errno : 0;
	free(path);
	return r;
}

void uffd_owned_move_name(struct uffd_name *from, struct uffd_name *name_ret)
{
	*name_ret = *from;
	from->path = NULL;
}

static void note_received(struct uffd_received *received, const struct cmsghdr *message)
{
	size_t count = (message->cmsg_len - CMSG_LEN(0)) / sizeof(int32_t);

	for (size_t i = 0; i < count; i++) {
		int32_t fd;

		memcpy(&fd, CMSG_DATA(message) + i * sizeof(fd), sizeof(fd));
		if (received->count < UFFD_RECEIVED_MAX)
			received->fds[received->count] = fd;
		else
			close(fd);
		received->count++;
	}
}

/* Every read of a message brings one, which may name a process that is gone: a negative number. */
static void note_pidfd(struct uffd_received *received, const struct cmsghdr *message)
{
	int32_t fd;

	memcpy(&fd, CMSG_DATA(message), sizeof(fd));
	if (fd < 0)
		return;
	if (received->pidfd < 0)
		received->pidfd = fd;
	else
		close(fd);
}

int64_t uffd_owned_receive(int sock, void *buffer, uint64_t size, struct uffd_received *received)
{
	/* CMSG_LEN, not CMSG_SPACE: its padding would have room for one more. */
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(struct ucred)) +
					      CMSG_SPACE(sizeof(int32_t)) +
					      CMSG_LEN(UFFD_RECEIVED_MAX * sizeof(int32_t))];
	struct iovec into = { buffer, size };
	struct msghdr message = {
		.msg_iov = &into,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	ssize_t n;

	do
		n = recvmsg(sock, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	for (struct cmsghdr *at = CMSG_FIRSTHDR(&message); at; at = CMSG_NXTHDR(&message, at)) {
		if (at->cmsg_level != SOL_SOCKET)
			continue;
		if (at->cmsg_type == SCM_RIGHTS)
			note_received(received, at);
		else if (at->cmsg_type == SCM_CREDENTIALS && !received->sender)
			memcpy(&received->sender, CMSG_DATA(at), sizeof(received->sender));
		else if (at->cmsg_type == SCM_PIDFD)
			note_pidfd(received, at);
	}
	received->is_truncated |= !!(message.msg_flags & MSG_CTRUNC);
	return n;
}

void uffd_owned_move(int32_t *from, int32_t *fd_ret)
{
	*fd_ret = take(from);
}

void uffd_owned_take(struct uffd_received *received, uint32_t index, int32_t *fd_ret)
{
	uffd_owned_move(&received->fds[index], fd_ret);
}

void uffd_owned_take_pidfd(struct uffd_received *received, int32_t *fd_ret)
{
	uffd_owned_move(&received->pidfd, fd_ret);
}

void uffd_owned_close_received(struct uffd_received *received)
{
	uint32_t held = received->count < UFFD_RECEIVED_MAX ? received->count : UFFD_RECEIVED_MAX;

	uffd_owned_close(&received->pidfd);
	for (uint32_t i = 0; i < held; i++)
		uffd_owned_close(&received->fds[i]);
}

int uffd_owned_read(int fd, struct uffd_messages *messages)
{
	ssize_t n = read(fd, messages->data, messages->capacity * sizeof(struct uffd_msg));

	/* Return EINTR: only the caller can let a Python signal handler run. */
	if (n < 0)
		return errno == EAGAIN ? 0 : -errno;
	messages->count = (uint32_t)((size_t)n / sizeof(struct uffd_msg));
	uffd_reads_note(fd);
	return 0;
}

static struct uffd_msg *fork_at(struct uffd_messages *messages, uint32_t index)
{
	struct uffd_msg *message = (struct uffd_msg *)messages->data + index;

	return message->event == UFFD_EVENT_FORK ? message : NULL;
}

void uffd_owned_take_fork(struct uffd_messages *messages, uint32_t index, int32_t *fd_ret)
{
	struct uffd_msg *message = fork_at(messages, index);

	if (!message || message->arg.fork.ufd == TAKEN)
		return;
	*fd_ret = (int32_t)message->arg.fork.ufd;
	message->arg.fork.ufd = TAKEN;
}

void uffd_owned_close_forks(struct uffd_messages *messages)
{
	for (uint32_t i = 0; i < messages->count; i++) {
		int32_t fd = -1;

		uffd_owned_take_fork(messages, i, &fd);
		uffd_owned_close(&fd);
	}
}
