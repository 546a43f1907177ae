// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tasks.h"

/* "/proc/PID", or "/proc/self", whatever the pid is in this PID namespace. */
void uffd_task_process(int32_t pid, char *path_ret, size_t size)
{
	if (pid)
		snprintf(path_ret, size, "/proc/%d", pid);
	else
		snprintf(path_ret, size, "/proc/self");
}

ssize_t uffd_task_read_path(const char *path, char *text_ret, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
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

ssize_t uffd_task_read(int32_t pid, int32_t thread_id, const char *name, char *text_ret,
			      size_t size)
{
	char process[32], path[80];

	uffd_task_process(pid, process, sizeof(process));
	snprintf(path, sizeof(path), "%s/task/%d/%s", process, thread_id, name);
	return uffd_task_read_path(path, text_ret, size);
}

bool uffd_task_has_exited(int32_t pid)
{
	char path[32], text[1024];
	const char *at;

	if (pid <= 0)
		return false;
	if (kill(pid, 0) && errno == ESRCH)
		return true;
	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	if (uffd_task_read_path(path, text, sizeof(text)) < 0)
		return false;
	at = strrchr(text, ')');
	return at && (!strncmp(at, ") Z", 3) || !strncmp(at, ") X", 3));
}
