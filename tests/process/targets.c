// SPDX-License-Identifier: MIT
/*
 * Programs that notice what is done to them: targets MODE [MILLISECONDS].
 *
 * spin: all registers keep their values, forever; a line for each SIGUSR1 while they do.
 * obey: the same, and a second thread that exits, executes "spin" or forks, as the first byte of standard input says.
 * Others make one system call and print its result, errno, and the milliseconds that it took.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t asked;

static void note(int number)
{
	(void)number;
	asked++;
}

/* Fill general and vector registers, wait a little, and compare. */
static int registers_are_kept(void)
{
	uint64_t in[8] __attribute__((aligned(64))), out[8] __attribute__((aligned(64)));
	uint64_t bad = 0;

	for (int i = 0; i < 8; i++)
		in[i] = 0x0123456789abcdefull * (uint64_t)(i + 1);
	__asm__ volatile("movdqa (%[in]), %%xmm0\n\t"
			 "movdqa 16(%[in]), %%xmm7\n\t"
			 "movdqa 32(%[in]), %%xmm15\n\t"
			 "mov $0x1111111111111111, %%r8\n\t"
			 "mov $0x2222222222222222, %%r12\n\t"
			 "mov $0x3333333333333333, %%r15\n\t"
			 "mov $0x4444444444444444, %%rbx\n\t"
			 "mov $0x5555555555555555, %%rcx\n\t"
			 "mov $20000, %%edx\n\t"
			 "1: pause\n\t"
			 "dec %%edx\n\t"
			 "jnz 1b\n\t"
			 "mov $0x1111111111111111, %%rax\n\t"
			 "xor %%rax, %%r8\n\t"
			 "mov $0x2222222222222222, %%rax\n\t"
			 "xor %%rax, %%r12\n\t"
			 "mov $0x3333333333333333, %%rax\n\t"
			 "xor %%rax, %%r15\n\t"
			 "mov $0x4444444444444444, %%rax\n\t"
			 "xor %%rax, %%rbx\n\t"
			 "mov $0x5555555555555555, %%rax\n\t"
			 "xor %%rax, %%rcx\n\t"
			 "or %%r12, %%r8\n\t"
			 "or %%r15, %%r8\n\t"
			 "or %%rbx, %%r8\n\t"
			 "or %%rcx, %%r8\n\t"
			 "mov %%r8, %[bad]\n\t"
			 "movdqa %%xmm0, (%[out])\n\t"
			 "movdqa %%xmm7, 16(%[out])\n\t"
			 "movdqa %%xmm15, 32(%[out])\n\t"
			 : [bad] "=m"(bad)
			 : [in] "r"(in), [out] "r"(out)
			 : "rax", "rbx", "rcx", "rdx", "r8", "r12", "r15", "xmm0", "xmm7", "xmm15",
			   "memory");
	return !bad && !memcmp(in, out, 48);
}

static void spin(void)
{
	int answered = 0;

	signal(SIGUSR1, note);
	puts("ready");
	fflush(stdout);
	while (registers_are_kept()) {
		if (answered != asked) {
			answered = asked;
			puts("kept");
			fflush(stdout);
		}
	}
	puts("changed");
	abort();
}

static void *obey(void *program)
{
	char word;

	if (read(0, &word, 1) != 1 || word == 'x')
		_exit(7);
	if (word == 'e')
		execl(program, program, "spin", (char *)NULL);
	/* Do not use stdio: the first thread may be inside fflush(), with "ready" still in the buffer. */
	if (word == 'f' && !fork())
		_exit(write(1, "forked\n", 7) != 7);
	for (;;)
		pause();
}

/* A filter that kills whoever opens a userfaultfd. */
static void forbid(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 323 /* userfaultfd */, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(*code), code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		abort();
}

static double now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static long wait_in(const char *mode, long ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000 };
	int ends[2], epoll = epoll_create1(0);
	struct epoll_event event = { .events = EPOLLIN };
	uint32_t word = 0;
	char byte;

	if (pipe(ends))
		abort();
	epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
	if (!strcmp(mode, "nanosleep"))
		return nanosleep(&time, NULL);
	if (!strcmp(mode, "poll"))
		return poll(&(struct pollfd){ .fd = ends[0], .events = POLLIN }, 1, (int)ms);
	if (!strcmp(mode, "futex"))
		return syscall(SYS_futex, &word, FUTEX_WAIT, 0, &time, NULL, 0);
	if (!strcmp(mode, "epoll_wait"))
		return epoll_wait(epoll, &event, 1, -1);
	if (!strcmp(mode, "read"))
		return read(0, &byte, 1);
	if (!strcmp(mode, "pause"))
		return pause();
	if (!strcmp(mode, "vfork")) {
		if (!vfork()) {
			nanosleep(&time, NULL);
			_exit(0);
		}
		return 0;
	}
	abort();
}

int main(int argc, char **argv)
{
	double begin;
	long result;

	if (argc > 2 && !strcmp(argv[argc - 1], "seccomp"))
		forbid();
	if (argc > 1 && !strcmp(argv[1], "obey")) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, obey, argv[0]))
			abort();
		spin();
	}
	if (argc < 2 || !strcmp(argv[1], "spin"))
		spin();
	puts("ready");
	fflush(stdout);
	signal(SIGUSR1, note);
	begin = now_ms();
	result = wait_in(argv[1], argc > 2 ? atol(argv[2]) : 0);
	printf("%ld %d %.0f\n", result, result < 0 ? errno : 0, now_ms() - begin);
	return 0;
}
