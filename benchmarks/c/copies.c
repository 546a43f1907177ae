// SPDX-License-Identifier: MIT
/*
 * The base case of a lazy restore by another process: copies FILE MIB THREADS.
 *
 * A child has registered MIB of private memory.  Threads copy the file, which they have mapped,
 * into it with UFFDIO_COPY, 4 MiB each time, and do nothing else.  Prints the seconds.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_THREADS = 64 };
#define STEP (UINT64_C(4) << 20)

static struct {
	int uffd;
	uint64_t target, source, length;
	_Atomic uint64_t next;
} work;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void *copy(void *argument)
{
	uint64_t at;

	while ((at = atomic_fetch_add(&work.next, STEP)) < work.length) {
		struct uffdio_copy step = {
			.dst = work.target + at,
			.src = work.source + at,
			.len = work.length - at < STEP ? work.length - at : STEP,
		};

		if (ioctl(work.uffd, UFFDIO_COPY, &step))
			err(1, "UFFDIO_COPY");
	}
	return argument;
}

/* In the child: register memory, tell where it is, and wait. */
static void be_restored(int pipe)
{
	struct uffdio_api api = { .api = UFFD_API };
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	void *memory = mmap(NULL, work.length, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct uffdio_register range = {
		.range = { (uintptr_t)memory, work.length },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	uint64_t told[] = { (uint64_t)uffd, (uintptr_t)memory };

	if (uffd < 0 || memory == MAP_FAILED || ioctl(uffd, UFFDIO_API, &api) ||
	    ioctl(uffd, UFFDIO_REGISTER, &range))
		err(1, "registering");
	if (write(pipe, told, sizeof(told)) != sizeof(told))
		err(1, "write");
	pause();
	_exit(0);
}

int main(int argc, char **argv)
{
	int threads = argc == 4 ? atoi(argv[3]) : 0, file, pipes[2], pidfd;
	pthread_t others[MOST_THREADS];
	uint64_t told[2];
	double began;
	void *mapped;
	pid_t child;

	if (threads < 1 || threads > MOST_THREADS)
		errx(2, "usage: copies FILE MIB THREADS");
	work.length = strtoull(argv[2], NULL, 0) << 20;
	file = open(argv[1], O_RDONLY | O_CLOEXEC);
	mapped = mmap(NULL, work.length, PROT_READ, MAP_SHARED, file, 0);
	if (file < 0 || mapped == MAP_FAILED || pipe(pipes))
		err(1, "%s", argv[1]);
	work.source = (uintptr_t)mapped;
	child = fork();
	if (child == 0)
		be_restored(pipes[1]);
	close(pipes[1]);
	if (child < 0 || read(pipes[0], told, sizeof(told)) != sizeof(told))
		errx(1, "the child failed");
	pidfd = (int)syscall(SYS_pidfd_open, child, 0);
	work.uffd = (int)syscall(SYS_pidfd_getfd, pidfd, (int)told[0], 0);
	work.target = told[1];
	if (work.uffd < 0)
		err(1, "pidfd_getfd");
	began = now();
	for (int i = 1; i < threads; i++)
		if (pthread_create(&others[i], NULL, copy, NULL))
			errx(1, "pthread_create");
	copy(NULL);
	for (int i = 1; i < threads; i++)
		pthread_join(others[i], NULL);
	printf("%.3f\n", now() - began);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	return 0;
}
