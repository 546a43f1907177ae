/* SPDX-License-Identifier: MIT */
/* Read what /proc says of a process and its threads, without malloc. `pid` 0: this process. */
#ifndef UFFD_TASKS_H
#define UFFD_TASKS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Open a file of the process for reading, with more flags; -1 and errno. */
int uffd_task_open(int32_t pid, const char *name, int flags);
/* The start of a file, as a string; the number of bytes, or -errno. */
ssize_t uffd_task_read(int32_t pid, const char *name, char *text_ret, size_t size);
ssize_t uffd_task_read_thread(int32_t pid, int32_t thread_id, const char *name, char *text_ret,
			      size_t size);
/* Call `visit` for each thread, until it returns false. */
void uffd_task_each_thread(int32_t pid, bool (*visit)(int32_t thread_id, void *argument),
			   void *argument);
/*
 * How many threads a process has, zombies included, by its open directory `task`; 0: unknown.  A
 * listing of that directory ends at a thread that ends meanwhile, or skips another one, so one that
 * has fewer is not complete.
 */
uint64_t uffd_task_count(int folder);
/* True also for a zombie; false for -1, an unknown process. */
bool uffd_task_has_exited(int32_t pid);

#endif /* UFFD_TASKS_H */
