// SPDX-License-Identifier: MIT
/*
 * Programs whose cores are examined: core_target MODE [NUMBER].
 *
 * Each prints lines "NAME ADDRESS LENGTH" of memory that its core must have, then "ready", and waits.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB (1ul << 20)

int answer = 4242;
static volatile int sink;

static void say(const char *name, const void *start, size_t length)
{
	printf("%s %lx %lx\n", name, (unsigned long)start, (unsigned long)length);
}

static void ready(void)
{
	puts("ready");
	fflush(stdout);
}

static void *map(size_t length, int prot, int flags, int fd, off_t offset)
{
	void *start = mmap(NULL, length, prot, flags, fd, offset);

	if (start == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	return start;
}

/* The content of a page depends on its number. */
static void fill(unsigned char *start, size_t length, int from)
{
	for (size_t at = 0; at < length; at += PAGE)
		memset(start + at, from + (int)(at / PAGE) % 100 + 1, PAGE);
}

__attribute__((noinline)) static void last_step(int number)
{
	for (;;)
		pause();
	sink = number;
}

__attribute__((noinline)) static void first_step(int number)
{
	last_step(number + 1);
	sink = number;
}

static pthread_barrier_t started;

static void *work(void *argument)
{
	pthread_barrier_wait(&started);
	first_step((int)(intptr_t)argument);
	return NULL;
}

static void threads(int count)
{
	pthread_attr_t attr;
	pthread_t thread;

	pthread_barrier_init(&started, NULL, (unsigned int)count + 1);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 64 << 10);
	for (intptr_t i = 0; i < count; i++)
		if (pthread_create(&thread, &attr, work, (void *)i))
			exit(1);
	pthread_barrier_wait(&started);
	usleep(20000);
	ready();
	first_step(-1);
}

/* A value in the part of a vector register that only AVX has. */
__attribute__((target("avx"), noinline)) static void vector(void)
{
	uint64_t value[4] __attribute__((aligned(32))) = { 0x1111, 0x2222, 0x3333, 0x4444 };

	ready();
	__asm__ volatile("vmovdqa (%0), %%ymm9\n"
			 "1: pause\n"
			 "jmp 1b\n"
			 :
			 : "r"(value)
			 : "xmm9", "memory");
}

/* A counter in a register, and in memory one instruction later. */
static void counts(void)
{
	uint64_t *counter = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	say("counter", counter, sizeof(*counter));
	ready();
	__asm__ volatile("xorl %%r12d, %%r12d\n"
			 "1: incq %%r12\n"
			 "movq %%r12, (%0)\n"
			 "jmp 1b\n"
			 :
			 : "r"(counter)
			 : "r12", "memory");
}

static void memory(const char *folder)
{
	const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
	unsigned char *start = map(16 * PAGE, PROT_READ | PROT_WRITE, anonymous, -1, 0);
	char path[4096];
	int fd;

	fill(start, 16 * PAGE, 0);
	madvise(start + 4 * PAGE, 4 * PAGE, MADV_DONTNEED); /* a hole */
	say("anonymous", start, 16 * PAGE);

	start = map(8 * PAGE, PROT_READ | PROT_WRITE, anonymous, -1, 0);
	say("untouched", start, 8 * PAGE);

	start = map(8 * PAGE, PROT_READ | PROT_WRITE, anonymous, -1, 0);
	fill(start, 8 * PAGE, 10);
	mprotect(start, 8 * PAGE, PROT_NONE);
	say("unreadable", start, 8 * PAGE);

	start = map(8 * PAGE, PROT_READ | PROT_WRITE, anonymous, -1, 0);
	fill(start, 8 * PAGE, 20);
	madvise(start, 8 * PAGE, MADV_DONTDUMP);
	say("dontdump", start, 8 * PAGE);

	start = map(1ul << 40, PROT_NONE, anonymous | MAP_NORESERVE, -1, 0);
	say("reserved", start, 1ul << 40);

	start = map(64ul << 30, PROT_READ | PROT_WRITE, anonymous | MAP_NORESERVE, -1, 0);
	madvise(start, 64ul << 30, MADV_NOHUGEPAGE);
	fill(start + (40ul << 30), 2 * PAGE, 30);
	say("scattered", start + (40ul << 30), 2 * PAGE);

	fd = memfd_create("shared", 0);
	if (ftruncate(fd, (off_t)(8ul << 30)) || pwrite(fd, "behind", 6, (off_t)(3 * PAGE)) != 6)
		exit(1);
	start = map(8ul << 30, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	fill(start, PAGE, 40);
	say("memfd", start, 16 * PAGE); /* page 3 is not in the page table */

	start = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	fill(start + PAGE, PAGE, 50);
	say("memfd_private", start, 8 * PAGE);

	start = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	fill(start, 8 * PAGE, 60);
	say("shared_anonymous", start, 8 * PAGE);

	snprintf(path, sizeof(path), "%s/data\nwith a newline", folder);
	fd = open(path, O_RDWR | O_CREAT, 0600);
	start = malloc(8 * PAGE);
	fill(start, 8 * PAGE, 70);
	if (write(fd, start, 8 * PAGE - 100) != (ssize_t)(8 * PAGE - 100))
		exit(1);
	start = map(10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	fill(start + PAGE, PAGE, 80);
	say("modified_file", start, 8 * PAGE); /* two more pages are beyond its end */
	start = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	sink = *start;
	say("unwritten_file", start, 8 * PAGE);
	start = map(8 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
	sink = *start;
	say("file", start, 8 * PAGE);
	start = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	sink = *start;
	say("shared_file", start, 8 * PAGE);

	start = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, anonymous | MAP_HUGETLB, -1, 0);
	if (start != MAP_FAILED) {
		fill(start, 2 * MIB, 90);
		say("hugetlb", start, 2 * MIB);
	}
	ready();
	first_step(0);
}

/* Two pending signals: one for the thread, one for the process. */
static void pending(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_BLOCK, &set, NULL);
	pthread_kill(pthread_self(), SIGUSR1);
	kill(getpid(), SIGUSR2);
	ready();
	first_step(0);
}

__attribute__((noinline)) static void wait_for_child(void)
{
	if (!vfork()) {
		pause();
		_exit(0);
	}
}

static void many(size_t count)
{
	unsigned char *start = map(count * PAGE, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	madvise(start, count * PAGE, MADV_NOHUGEPAGE);
	fill(start, count * PAGE, 0);
	for (size_t i = 0; i < count; i += 2)
		if (mprotect(start + i * PAGE, PAGE, PROT_READ)) {
			perror("mprotect");
			exit(1);
		}
	say("many", start, count * PAGE);
	ready();
	first_step(0);
}

static void big(size_t length)
{
	unsigned char *start = map(length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
				   0);

	fill(start, length, 0);
	say("big", start, length);
	ready();
	first_step(0);
}

/*
 * Memory registered with a userfaultfd that nobody serves: a thread that touches a page outside the
 * page table waits.  Some content of the file is not in the page table.
 */
static void registered(void)
{
	int fd = memfd_create("registered", 0), uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM };
	struct uffdio_register reg = {
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};
	unsigned char *start, page[PAGE];

	memset(page, 7, PAGE);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ftruncate(fd, 8 * PAGE) ||
	    pwrite(fd, page, PAGE, 2 * PAGE) != (ssize_t)PAGE)
		exit(1);
	start = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	reg.range.start = (uintptr_t)start;
	reg.range.len = 8 * PAGE;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		exit(1);
	say("registered", start, 8 * PAGE);
	start = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fill(start, PAGE, 0);
	reg.range.start = (uintptr_t)start;
	reg.mode = UFFDIO_REGISTER_MODE_MISSING;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		exit(1);
	say("anonymous", start, 8 * PAGE);
	ready();
	first_step(0);
}

/* Huge pages of a file: one that the process has written, and one that is only in the file. */
static void huge_file(void)
{
	int fd = memfd_create("huge", MFD_HUGETLB);
	unsigned char *start, *other;

	if (fd < 0 || ftruncate(fd, (off_t)(4 * MIB)))
		exit(1);
	start = map(4 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	other = map(4 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	fill(start, PAGE, 0);
	fill(other + 2 * MIB, PAGE, 1);
	munmap(other, 4 * MIB);
	say("huge", start, 4 * MIB);
	ready();
	first_step(0);
}

static void note(int number)
{
	(void)number;
}

/* After a signal it maps memory that must not be in the core. */
static void later(void)
{
	sigset_t set, before;
	unsigned char *start;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, &before);
	signal(SIGUSR1, note);
	ready();
	sigsuspend(&before);
	start = map(64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(start, 64 * PAGE, MADV_DONTDUMP);
	fill(start, 64 * PAGE, 0);
	start[PAGE] = 'x';
	say("later", start, 64 * PAGE);
	ready();
	first_step(0);
}

/* After a signal it executes another program. */
static void other(char **words)
{
	sigset_t set, before;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, &before);
	signal(SIGUSR1, note);
	ready();
	sigsuspend(&before);
	execl("/proc/self/exe", words[0], "threads", "0", NULL);
	exit(1);
}

int main(int count, char **words)
{
	const char *mode = count > 1 ? words[1] : "";
	const char *word = count > 2 ? words[2] : "0";
	size_t number = strtoul(word, NULL, 10);

	if (!strcmp(mode, "threads"))
		threads((int)number);
	else if (!strcmp(mode, "vector"))
		vector();
	else if (!strcmp(mode, "count"))
		counts();
	else if (!strcmp(mode, "memory"))
		memory(word);
	else if (!strcmp(mode, "pending"))
		pending();
	else if (!strcmp(mode, "vfork")) {
		ready();
		wait_for_child();
	} else if (!strcmp(mode, "many"))
		many(number);
	else if (!strcmp(mode, "big"))
		big(number * MIB);
	else if (!strcmp(mode, "registered"))
		registered();
	else if (!strcmp(mode, "huge_file"))
		huge_file();
	else if (!strcmp(mode, "later"))
		later();
	else if (!strcmp(mode, "other"))
		other(words);
	return 1;
}
