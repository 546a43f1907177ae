/* SPDX-License-Identifier: MIT */
/*
 * Own what system calls create from the call on.
 *
 * A Python signal handler may raise an exception as soon as a C function has returned,
 * and then the return value is lost.  So these functions write what they created to
 * memory that the caller already owns, and whose destructor is below.  Each destructor
 * may be called again, also after an error.
 */
#ifndef UFFD_OWNED_H
#define UFFD_OWNED_H

#include <stdint.h>

/* Descriptors; -1: none.  All are created with close-on-exec. */
int uffd_owned_open(const char *path, int flags, uint32_t mode, int32_t *fd_ret);
int uffd_owned_open_syscall(int flags, int32_t *fd_ret);
int uffd_owned_open_device(const char *path, int flags, int32_t *fd_ret);
int uffd_owned_memfd_create(const char *name, uint32_t flags, int32_t *fd_ret);
/* `least`: the lowest number to use. */
int uffd_owned_duplicate(int fd, int least, int32_t *fd_ret);
int uffd_owned_eventfd(int32_t *fd_ret);
int uffd_owned_pipe(int least, int32_t *read_ret, int32_t *write_ret);
int uffd_owned_pidfd_open(int32_t pid, int32_t *fd_ret);
int uffd_owned_close(int32_t *fd);
/* Move it to another owner. */
void uffd_owned_move(int32_t *from, int32_t *fd_ret);

/* A mapping; start 0: none. */
struct uffd_mapping {
	uint64_t start;
	uint64_t length;
	uint32_t is_ending; /* a thread unmaps it */
};

int uffd_owned_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd,
		    uint64_t offset, struct uffd_mapping *mapping_ret);
int uffd_owned_munmap(struct uffd_mapping *mapping);
void uffd_owned_move_mapping(struct uffd_mapping *from, struct uffd_mapping *mapping_ret);

/*
 * The name of a file.  The destructor removes it if it still names that file and `pid` is
 * this process; not in a fork, and not if `pid` is 0, for a name that must stay.
 */
struct uffd_name {
	int32_t pid;
	uint64_t device;
	uint64_t inode;
	char *path;
};

/* Create a file that does not exist yet; its name will be removed. */
int uffd_owned_create(const char *path, int flags, uint32_t mode, int32_t *fd_ret,
		      struct uffd_name *name_ret);
/* Note the name of an open file; it will stay. */
int uffd_owned_name(const char *path, int fd, struct uffd_name *name_ret);
int uffd_owned_unlink(struct uffd_name *name);
void uffd_owned_move_name(struct uffd_name *from, struct uffd_name *name_ret);

/* Descriptors from a socket: the most that one message can carry. */
#define UFFD_RECEIVED_MAX	253

struct uffd_received {
	/* All that were received; those above the limit are closed. */
	uint32_t count;
	uint32_t is_truncated;
	/* The process that the first credentials name; 0: none came. */
	int32_t sender;
	/* A pidfd of that process; -1: none came, initially too. */
	int32_t pidfd;
	int32_t fds[UFFD_RECEIVED_MAX];
};

/*
 * Read bytes and descriptors without blocking; the descriptors are added to those received
 * before.  Returns the bytes, 0 at the end of the stream, or -errno.
 */
int64_t uffd_owned_receive(int sock, void *buffer, uint64_t size, struct uffd_received *received);
/* Move one descriptor to a new owner. */
void uffd_owned_take(struct uffd_received *received, uint32_t index, int32_t *fd_ret);
/* Move the pidfd to a new owner. */
void uffd_owned_take_pidfd(struct uffd_received *received, int32_t *fd_ret);
void uffd_owned_close_received(struct uffd_received *received);

/* Messages of a userfaultfd; a fork's message owns a descriptor, -1 once it is taken. */
struct uffd_messages {
	uint32_t capacity;
	uint32_t count;
	/* 32 bytes each */
	uint64_t data[];
};

/* Read the queued messages, up to the capacity; finding none is not an error. */
int uffd_owned_read(int fd, struct uffd_messages *messages);
/* Move the descriptor of a fork's message to a new owner. */
void uffd_owned_take_fork(struct uffd_messages *messages, uint32_t index, int32_t *fd_ret);
void uffd_owned_close_forks(struct uffd_messages *messages);

#endif
