// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/tasks.h"

int uffd_task_open(int32_t pid, const char *name, int flags)
{
	char path[96];

	/* Whatever our pid is in this PID namespace. */
	if (pid)
		snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	else
		snprintf(path, sizeof(path), "/proc/self/%s", name);
	return open(path, O_RDONLY | O_CLOEXEC | flags);
}

ssize_t uffd_task_read(int32_t pid, const char *name, char *text_ret, size_t size)
{
	int fd = uffd_task_open(pid, name, 0);
	ssize_t n;

	text_ret[0] = 0;
	if (fd < 0)
		return -errno;
	n = read(fd, text_ret, size - 1);
	if (n < 0)
		n = -errno;
	else
		text_ret[n] = 0;
	close(fd);
	return n;
}

ssize_t uffd_task_read_thread(int32_t pid, int32_t thread_id, const char *name, char *text_ret,
			      size_t size)
{
	char path[64];

	snprintf(path, sizeof(path), "task/%d/%s", thread_id, name);
	return uffd_task_read(pid, path, text_ret, size);
}

struct directory_entry {
	uint64_t inode;
	int64_t offset;
	uint16_t size;
	uint8_t type;
	char name[];
};

/* Not opendir(3), which calls malloc. */
void uffd_task_each_thread(int32_t pid, bool (*visit)(int32_t thread_id, void *argument),
			   void *argument)
{
	_Alignas(struct directory_entry) char entries[4096];
	int fd = uffd_task_open(pid, "task", O_DIRECTORY);
	bool goes_on = true;
	long size;

	if (fd < 0)
		return;
	while (goes_on && (size = syscall(SYS_getdents64, fd, entries, sizeof(entries))) > 0) {
		for (long at = 0; at < size && goes_on;) {
			struct directory_entry *entry = (void *)(entries + at);
			int32_t thread_id = atoi(entry->name);

			at += entry->size;
			goes_on = thread_id <= 0 || visit(thread_id, argument);
		}
	}
	close(fd);
}

uint64_t uffd_task_count(int folder)
{
	struct stat status;

	/* proc_task_getattr() of the kernel adds the number of threads. */
	return !fstat(folder, &status) && status.st_nlink > 2 ? status.st_nlink - 2 : 0;
}

bool uffd_task_has_exited(int32_t pid)
{
	char text[1024];
	const char *at;

	if (pid <= 0)
		return false;
	if (kill(pid, 0) && errno == ESRCH)
		return true;
	if (uffd_task_read(pid, "stat", text, sizeof(text)) < 0)
		return false;
	at = strrchr(text, ')');
	return at && (!strncmp(at, ") Z", 3) || !strncmp(at, ") X", 3));
}
