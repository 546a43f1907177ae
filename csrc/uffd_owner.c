// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "uffd_owner.h"

/* Longer lines end in the path of a file, which is not used. */
#define LINE_SIZE	256
#define TOUCHED_AT_ONCE	256

struct lines {
	int fd;
	char buffer[4096];
	size_t at, filled;
};

/* Read the next line, cut at LINE_SIZE; returns 1, 0 at the end, or -errno. */
static int next_line(struct lines *lines, char line[LINE_SIZE])
{
	size_t length = 0;

	for (;;) {
		if (lines->at == lines->filled) {
			ssize_t n = read(lines->fd, lines->buffer, sizeof(lines->buffer));

			if (n < 0 && errno == EINTR)
				continue;
			if (n < 0)
				return -errno;
			if (n == 0)
				return 0;
			lines->filled = (size_t)n;
			lines->at = 0;
		}
		char c = lines->buffer[lines->at++];

		if (c == '\n') {
			line[length] = '\0';
			return 1;
		}
		if (length < LINE_SIZE - 1)
			line[length++] = c;
	}
}

struct mapping {
	uint64_t start, end;
	bool shared, anonymous;
};

/* "start-end rwxp offset major:minor inode path"; false for other lines. */
static bool parse_mapping(const char *line, struct mapping *mapping)
{
	char sharing;
	unsigned long start, end, inode;

	if (sscanf(line, "%lx-%lx %*c%*c%*c%c %*x %*x:%*x %lu", &start, &end, &sharing, &inode) != 4)
		return false;
	*mapping = (struct mapping){ start, end, sharing == 's', inode == 0 };
	return true;
}

/* "VmFlags: rd wr ...": two letters each. */
static uint32_t facts_of_flags(const char *line)
{
	uint32_t facts = 0;

	if (strstr(line, " um") || strstr(line, " uw") || strstr(line, " ui"))
		facts |= UFFD_MAPS_REGISTERED;
	if (strstr(line, " dc") || strstr(line, " wf"))
		facts |= UFFD_MAPS_NOT_FORKED;
	return facts;
}

static int look_through(int fd, uint64_t start, uint64_t length, bool all_facts,
			uint32_t *facts_ret)
{
	uint32_t every = all_facts ? UFFD_MAPS_REGISTERED | UFFD_MAPS_NOT_FORKED : 0, some = 0;
	struct lines lines = { .fd = fd };
	uint64_t at = start, end = start + length;
	struct mapping mapping;
	bool inside = false, any = false;
	char line[LINE_SIZE];
	int r;

	while ((r = next_line(&lines, line)) > 0) {
		any = true;
		if (inside && strncmp(line, "VmFlags:", 8) == 0)
			every &= facts_of_flags(line);
		if (!parse_mapping(line, &mapping))
			continue;
		inside = mapping.end > at && at < end;
		if (!inside && at >= end)
			break;
		if (!inside)
			continue;
		if (mapping.start > at)
			return -EFAULT;
		at = mapping.end;
		some |= (mapping.shared ? UFFD_MAPS_SHARED : 0) |
			(mapping.anonymous ? UFFD_MAPS_ANONYMOUS : 0);
	}
	if (r < 0)
		return r;
	*facts_ret = some | every;
	/* A process that has exited has no lines. */
	return !any ? -ESRCH : at < end ? -EFAULT : 0;
}

static int look_at(int folder, const char *path, uint64_t start, uint64_t length, bool all_facts,
		   uint32_t *facts_ret)
{
	int fd = openat(folder, path, O_RDONLY | O_CLOEXEC), r;

	*facts_ret = 0;
	if (fd < 0)
		return errno == ENOENT ? -ESRCH : -errno;
	r = look_through(fd, start, length, all_facts, facts_ret);
	close(fd);
	return r;
}

int uffd_owner_look(int32_t pid, uint64_t start, uint64_t length, uint32_t all_facts,
		    uint32_t *facts_ret)
{
	char path[40], name[16] = "self";

	/* Not by our own id, which procfs of another PID namespace gives to another process. */
	if (pid != getpid())
		snprintf(name, sizeof(name), "%d", pid);
	snprintf(path, sizeof(path), "/proc/%s/%s", name, all_facts ? "smaps" : "maps");
	return look_at(AT_FDCWD, path, start, length, all_facts, facts_ret);
}

int64_t uffd_owner_read(int32_t pid, uint64_t start, void *target, uint64_t length)
{
	struct iovec here = { target, length };
	struct iovec there = { (void *)(uintptr_t)start, length };
	ssize_t n = process_vm_readv(pid, &here, 1, &there, 1, 0);

	return n < 0 ? -errno : n;
}

int uffd_owner_touch(int32_t pid, uint64_t start, uint64_t length, uint64_t step)
{
	struct iovec there[TOUCHED_AT_ONCE];
	char bytes[TOUCHED_AT_ONCE];
	struct iovec here = { bytes, sizeof(bytes) };

	for (uint64_t at = start; at < start + length;) {
		size_t wanted = 0;
		ssize_t n;

		while (wanted < TOUCHED_AT_ONCE && at + wanted * step < start + length) {
			there[wanted] = (struct iovec){ (void *)(uintptr_t)(at + wanted * step), 1 };
			wanted++;
		}
		n = process_vm_readv(pid, &here, 1, there, wanted, 0);
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EFAULT;
		at += (uint64_t)n * step;
	}
	return 0;
}

/* The number behind a name in /proc/PID/status; 0: there is none, or there are several. */
static long status_field(const char *status, const char *name)
{
	const char *found = strstr(status, name);
	char *end;
	long value;

	if (!found)
		return 0;
	value = strtol(found + strlen(name), &end, 10);
	return *end == '\n' ? value : 0;
}

/* A thread's process, if both are in our own PID namespace; -ESRCH: it is gone. */
static int process_of(int folder, uint32_t thread_id, int32_t *pid_ret)
{
	int fd = openat(folder, "status", O_RDONLY | O_CLOEXEC);
	char status[4096];
	ssize_t n;

	if (fd < 0)
		return -ESRCH;
	n = read(fd, status, sizeof(status) - 1);
	close(fd);
	if (n <= 0)
		return -ESRCH;
	status[n] = '\0';
	*pid_ret = (int32_t)status_field(status, "\nTgid:\t");
	return *pid_ret > 0 && status_field(status, "\nNSpid:\t") == (long)thread_id ? 0 : -EFAULT;
}

int uffd_owner_of_thread(uint32_t thread_id, uint64_t address, int32_t *pid_ret, int *pidfd_ret)
{
	int32_t again = 0;
	uint32_t facts = 0;
	char path[40];
	int folder, r;

	*pid_ret = 0;
	*pidfd_ret = -1;
	snprintf(path, sizeof(path), "/proc/%u", thread_id);
	/* The open directory stays this thread's, even if the id is reused. */
	folder = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (folder < 0)
		return errno == ENOENT ? -ESRCH : -errno;
	r = process_of(folder, thread_id, pid_ret);
	if (r == 0) {
		*pidfd_ret = (int)syscall(SYS_pidfd_open, *pid_ret, 0);
		r = *pidfd_ret < 0 ? -errno : 0;
	}
	if (r == 0)
		r = look_at(folder, "smaps", address, 1, true, &facts);
	if (r == 0 && !(facts & UFFD_MAPS_REGISTERED))
		r = -EFAULT;
	/* The thread still lives, so its process did when the pidfd was opened. */
	if (r == 0)
		r = process_of(folder, thread_id, &again);
	if (r == 0 && again != *pid_ret)
		r = -ESRCH;
	close(folder);
	if (r && *pidfd_ret >= 0) {
		close(*pidfd_ret);
		*pidfd_ret = -1;
	}
	return r;
}
