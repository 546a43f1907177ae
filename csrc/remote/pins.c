// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/page.h"
#include "base/tasks.h"
#include "dirty/ranges.h"
#include "remote/pins.h"

#define LINK_MOST 32 /* enough of a name to tell what it is */
#define IOVECS_MOST 1024u

static bool begins_with(const char *text, const char *const *begins, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (!strncmp(text, begins[i], strlen(begins[i])))
			return true;
	return false;
}

static bool may_pin(const char *link)
{
	static const char *const begins[] = {
		"anon_inode:[io_uring]", "/dev/vfio/", "/dev/iommu", "/dev/infiniband/",
		"anon_inode:[vfio",
	};

	return begins_with(link, begins, sizeof(begins) / sizeof(*begins));
}

/* Whether a read of it may go past the page table, also without O_DIRECT: FUSE decides itself. */
static bool may_be_direct(const char *link)
{
	static const char *const others[] = {
		"pipe:", "socket:", "anon_inode:", "/dev/pts/", "/dev/tty", "/dev/null", "/dev/urandom",
	};

	return !begins_with(link, others, sizeof(others) / sizeof(*others));
}

static bool read_link(int folder, const char *name, char link_ret[LINK_MOST])
{
	ssize_t length = readlinkat(folder, name, link_ret, LINK_MOST - 1);

	if (length >= 0)
		link_ret[length] = '\0';
	return length >= 0;
}

static bool read_text(int folder, const char *name, char *text_ret, size_t size)
{
	int fd = openat(folder, name, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text_ret, size - 1);

	if (fd >= 0)
		close(fd);
	if (n >= 0)
		text_ret[n] = '\0';
	return n > 0;
}

/* A folder of a process in /proc, to open files of it. */
static int open_folder(int32_t pid, const char *name)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

static bool is_direct(int infos, const char *name)
{
	char text[128];
	const char *flags;

	if (infos < 0 || !read_text(infos, name, text, sizeof(text)))
		return false;
	flags = strstr(text, "flags:");
	return flags && strtoul(flags + strlen("flags:"), NULL, 8) & O_DIRECT;
}

int uffd_remote_pinners(int32_t pid, struct uffd_pinners *pinners)
{
	char text[LINK_MOST];
	const struct dirent *entry;
	DIR *folder;
	int infos;

	pinners->count = 0;
	pinners->direct_fd = -1;
	snprintf(text, sizeof(text), "/proc/%d/fd", pid);
	folder = opendir(text);
	if (!folder)
		return -errno;
	infos = open_folder(pid, "fdinfo");
	while ((entry = readdir(folder))) {
		int32_t fd = (int32_t)strtol(entry->d_name, NULL, 10);

		/* Closed since, or the folder itself. */
		if (!read_link(dirfd(folder), entry->d_name, text))
			continue;
		if (pinners->direct_fd < 0 && may_be_direct(text) && is_direct(infos, entry->d_name))
			pinners->direct_fd = fd;
		if (!may_pin(text))
			continue;
		if (pinners->count < pinners->capacity)
			pinners->fds[pinners->count] = fd;
		pinners->count++;
	}
	if (infos >= 0)
		close(infos);
	closedir(folder);
	return 0;
}

static int add(struct uffd_page_ranges *pages, uint64_t start, uint64_t length)
{
	uint64_t end;

	if (!length || __builtin_add_overflow(start, length + BASE_PAGE - 1, &end))
		return 0;
	return uffd_ranges_append(pages, start / BASE_PAGE * BASE_PAGE, end / BASE_PAGE * BASE_PAGE);
}

static int add_vector(struct uffd_page_ranges *pages, int32_t pid, uint64_t address, uint64_t count)
{
	struct iovec buffers[IOVECS_MOST];
	struct iovec here = { buffers, lower(count, IOVECS_MOST) * sizeof(*buffers) };
	struct iovec there = { (void *)(uintptr_t)address, here.iov_len };
	ssize_t n = process_vm_readv(pid, &here, 1, &there, 1, 0);
	int ret = 0;

	for (ssize_t i = 0; !ret && i < n / (ssize_t)sizeof(*buffers); i++)
		ret = add(pages, (uintptr_t)buffers[i].iov_base, buffers[i].iov_len);
	return ret;
}

static bool reads_a_file(int fds, uint64_t fd)
{
	char name[16], link[LINK_MOST];

	snprintf(name, sizeof(name), "%d", (int32_t)fd);
	return read_link(fds, name, link) && may_be_direct(link);
}

/* What a thread sleeps in, from its `syscall` in /proc. */
static int look_at(struct uffd_reads *reads, int32_t pid, int fds, const char *text)
{
	unsigned long long fd, buffer, length;
	long number;

	if (!strncmp(text, "running", strlen("running"))) {
		reads->running++;
		return 0;
	}
	if (sscanf(text, "%ld %llx %llx %llx", &number, &fd, &buffer, &length) != 4)
		return 0;
	switch (number) {
	case SYS_read:
	case SYS_pread64:
		return reads_a_file(fds, fd) ? add(&reads->pages, buffer, length) : 0;
	case SYS_readv:
	case SYS_preadv:
	case SYS_preadv2:
		return reads_a_file(fds, fd) ? add_vector(&reads->pages, pid, buffer, length) : 0;
	default:
		return 0;
	}
}

int uffd_remote_reads(int32_t pid, struct uffd_reads *reads_ret)
{
	char text[192];
	const struct dirent *entry;
	uint64_t listed = 0;
	DIR *tasks;
	int fds, ret = 0;

	*reads_ret = (struct uffd_reads){ 0 };
	snprintf(text, sizeof(text), "/proc/%d/task", pid);
	tasks = opendir(text);
	if (!tasks)
		return -errno;
	fds = open_folder(pid, "fd");
	while (!ret && (entry = readdir(tasks))) {
		char name[sizeof("2147483647/syscall")];

		if (entry->d_name[0] == '.' || strlen(entry->d_name) > 10)
			continue;
		snprintf(name, sizeof(name), "%.10s/syscall", entry->d_name);
		if (read_text(dirfd(tasks), name, text, sizeof(text)))
			ret = look_at(reads_ret, pid, fds, text);
		listed++;
	}
	/* Others were not looked at. */
	if (listed < uffd_task_count(dirfd(tasks)))
		reads_ret->running++;
	if (fds >= 0)
		close(fds);
	closedir(tasks);
	if (ret) {
		uffd_remote_free_reads(reads_ret);
		reads_ret->running = 0;
	}
	return ret;
}

void uffd_remote_free_reads(struct uffd_reads *reads)
{
	uffd_pagemap_release(&reads->pages);
}
