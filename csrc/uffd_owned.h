/* SPDX-License-Identifier: MIT */
/*
 * What system calls make, held from the call on.
 *
 * A Python signal handler may raise an exception as soon as a C function has
 * returned, and the return value is lost then.  So these write what they made to
 * a place that the caller has already, and whose destructor is below.  Each
 * destructor may be called again, also after an error.
 */
#ifndef UFFD_OWNED_H
#define UFFD_OWNED_H

#include <stdint.h>

/* Descriptors: -1 where there is none.  All are made with close-on-exec. */
int uffd_owned_open(const char *path, int flags, uint32_t mode, int32_t *fd_ret);
int uffd_owned_open_syscall(int flags, int32_t *fd_ret);
int uffd_owned_open_device(const char *path, int flags, int32_t *fd_ret);
int uffd_owned_memfd_create(const char *name, uint32_t flags, int32_t *fd_ret);
/* `least`: no number below that. */
int uffd_owned_duplicate(int fd, int least, int32_t *fd_ret);
int uffd_owned_eventfd(int32_t *fd_ret);
int uffd_owned_pidfd_open(int32_t pid, int32_t *fd_ret);
int uffd_owned_close(int32_t *fd);
/* Give it to another owner. */
void uffd_owned_move(int32_t *from, int32_t *fd_ret);

/* A mapping; start 0 where there is none. */
struct uffd_mapping {
	uint64_t start;
	uint64_t length;
};

int uffd_owned_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd,
		    uint64_t offset, struct uffd_mapping *mapping_ret);
int uffd_owned_munmap(struct uffd_mapping *mapping);
void uffd_owned_move_mapping(struct uffd_mapping *from, struct uffd_mapping *mapping_ret);

/*
 * The name of a file, which its destructor removes if it is still that file's and
 * `pid` is this process: not its fork, and not 0, which lets it stay.
 */
struct uffd_name {
	int32_t pid;
	uint64_t device;
	uint64_t inode;
	char *path;
};

/* Create a file that does not exist yet; its name is to be removed. */
int uffd_owned_create(const char *path, int flags, uint32_t mode, int32_t *fd_ret,
		      struct uffd_name *name_ret);
/* The name by which an open file was found; it is to stay. */
int uffd_owned_name(const char *path, int fd, struct uffd_name *name_ret);
int uffd_owned_unlink(struct uffd_name *name);
void uffd_owned_move_name(struct uffd_name *from, struct uffd_name *name_ret);

/* Descriptors that came over a socket: the most that one message can carry. */
#define UFFD_RECEIVED_MAX	253

struct uffd_received {
	/* All that came; those above the limit are closed. */
	uint32_t count;
	uint32_t is_truncated;
	/* The process that the first credentials name, 0 without any. */
	int32_t sender;
	int32_t fds[UFFD_RECEIVED_MAX];
};

/*
 * Read bytes and descriptors, which come on top of those received before, without
 * waiting; return the bytes, 0 at the end of the stream, or -errno.
 */
int64_t uffd_owned_receive(int sock, void *buffer, uint64_t size, struct uffd_received *received);
/* Hand one over to a place of its own. */
void uffd_owned_take(struct uffd_received *received, uint32_t index, int32_t *fd_ret);
void uffd_owned_close_received(struct uffd_received *received);

/* Messages of a userfaultfd; those of forks bring descriptors, -1 once they are taken. */
struct uffd_messages {
	uint32_t capacity;
	uint32_t count;
	/* 32 bytes each */
	uint64_t data[];
};

/* Read what is queued, up to the capacity; none is no error. */
int uffd_owned_read(int fd, struct uffd_messages *messages);
/* Hand the descriptor of a fork's message over to a place of its own. */
void uffd_owned_take_fork(struct uffd_messages *messages, uint32_t index, int32_t *fd_ret);
void uffd_owned_close_forks(struct uffd_messages *messages);

#endif
