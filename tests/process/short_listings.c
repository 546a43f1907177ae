// SPDX-License-Identifier: MIT
/*
 * LD_PRELOAD library: the first LISTINGS listings of a /proc/PID/task end after their first thread, as
 * they do where that thread ends meanwhile.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static _Atomic long ended;

/* Whether it ends before this entry. */
static int ends(DIR *folder, const struct dirent *entry, long before)
{
	char link[40], path[64];
	ssize_t n;

	if (!entry || before < 3) /* ".", ".." and a thread */
		return 0;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", dirfd(folder));
	n = readlink(link, path, sizeof(path) - 1);
	if (n < 5 || strncmp(path + n - 5, "/task", 5))
		return 0;
	return atomic_fetch_add(&ended, 1) < atol(getenv("LISTINGS"));
}

struct dirent *readdir(DIR *folder)
{
	struct dirent *(*real)(DIR *) = dlsym(RTLD_NEXT, "readdir");
	long before = telldir(folder);
	struct dirent *entry = real(folder);

	return ends(folder, entry, before) ? NULL : entry;
}

struct dirent64 *readdir64(DIR *folder)
{
	return (struct dirent64 *)readdir(folder);
}
