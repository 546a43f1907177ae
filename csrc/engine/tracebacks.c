// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tracebacks.h"
#include "base/clock.h"
#include "base/threads.h"

#define STACK_SIZE (256ul << 10)
/* A thread that runs Python gives the GIL to another one after 5 ms (sys.setswitchinterval). */
#define GIL_LIMIT_NS 200000000ull
#define NS_PER_S 1000000000ull

/* Of Python's stable ABI; absent in a program without Python. */
__attribute__((weak)) int PyGILState_Ensure(void);
__attribute__((weak)) void PyGILState_Release(int state);

static const int fatal[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT };

/* As the kernel has it on x86-64. */
struct kernel_action {
	void (*handler)(int number);
	unsigned long flags;
	void (*restorer)(void);
	uint64_t mask;
};

#define SA_RESTORER 0x04000000ul

static void end_process(int number)
{
	(void)number;
	syscall(SYS_exit_group, 1);
}

static void never_returns(void)
{
}

/*
 * It must not return to anything of the engine, nor run a handler of the program's.  What wraps
 * sigaction(3) (ThreadSanitizer, libjsig) keeps the handlers in the memory that is shared: not used.
 */
static int run_handler(void *argument)
{
	struct kernel_action end = { end_process, SA_RESTORER, never_returns, 0 };
	int number = *(const int *)argument;
	uint64_t blocked = ~(1ull << (number - 1));

	for (size_t i = 0; i < sizeof(fatal) / sizeof(fatal[0]); i++) {
		syscall(SYS_rt_sigaction, fatal[i], &end, NULL, sizeof(end.mask));
		blocked &= ~(1ull << (fatal[i] - 1));
	}
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &blocked, NULL, sizeof(blocked));
	syscall(SYS_tgkill, (pid_t)syscall(SYS_getpid), (pid_t)syscall(SYS_gettid), number);
	syscall(SYS_exit_group, 0);
	return 0;
}

/* Sharing the memory makes no fork event, which nobody could read now. */
static void show_in_process(int number)
{
	char *stack = mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	pid_t child;

	if (stack == MAP_FAILED)
		return;
	/* No signal tells the program that it ends, and no wait(2) of the program's finds it. */
	child = clone(run_handler, stack + STACK_SIZE, CLONE_VM | CLONE_VFORK | CLONE_FILES,
		      &number);
	if (child > 0)
		while (waitpid(child, NULL, __WALL) < 0 && errno == EINTR)
			;
	munmap(stack, STACK_SIZE);
}

/* One thread at a time; one that waits for the GIL still has been given up. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool is_ready; /* `changed` is made */
	int number;
	bool is_busy, is_wanted, has_gil;
} shower = { .lock = PTHREAD_MUTEX_INITIALIZER };

void uffd_tracebacks_forget_parent(void)
{
	pthread_mutex_init(&shower.lock, NULL);
	shower.is_ready = shower.is_busy = false;
}

static void *show(void *argument)
{
	int state = PyGILState_Ensure();
	bool is_wanted;
	sigset_t only;

	pthread_mutex_lock(&shower.lock);
	is_wanted = shower.is_wanted;
	shower.has_gil = true;
	pthread_mutex_unlock(&shower.lock);
	if (is_wanted) {
		sigemptyset(&only);
		sigaddset(&only, shower.number);
		pthread_kill(pthread_self(), shower.number);
		pthread_sigmask(SIG_UNBLOCK, &only, NULL);
	}
	PyGILState_Release(state);
	pthread_mutex_lock(&shower.lock);
	shower.is_busy = false;
	pthread_cond_signal(&shower.changed);
	pthread_mutex_unlock(&shower.lock);
	return argument;
}

static bool start_thread(int number)
{
	pthread_t thread;

	if (!shower.is_ready)
		uffd_cond_init(&shower.changed);
	shower.is_ready = true;
	if (shower.is_busy)
		return false;
	shower.number = number;
	shower.is_wanted = true;
	shower.has_gil = false;
	shower.is_busy = !uffd_thread_start_detached(&thread, 0, show, NULL);
	return shower.is_busy;
}

/* Return whether a thread with the GIL has done it. */
static bool show_in_thread(int number)
{
	uint64_t until_ns = uffd_now_ns() + GIL_LIMIT_NS;
	struct timespec until = { .tv_sec = (time_t)(until_ns / NS_PER_S),
				  .tv_nsec = (long)(until_ns % NS_PER_S) };
	bool done = false;

	pthread_mutex_lock(&shower.lock);
	if (start_thread(number)) {
		while (shower.is_busy &&
		       (shower.has_gil || uffd_now_ns() < until_ns))
			pthread_cond_timedwait(&shower.changed, &shower.lock, &until);
		done = shower.has_gil;
		shower.is_wanted = false;
	}
	pthread_mutex_unlock(&shower.lock);
	return done;
}

void uffd_show_tracebacks(int number, bool has_gil)
{
	if (!has_gil || !PyGILState_Ensure || !show_in_thread(number))
		show_in_process(number);
}
