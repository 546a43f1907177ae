// SPDX-License-Identifier: MIT
/*
 * The signal handler jumps back to the interrupted access, if the thread is in one, and
 * passes every other signal on to the previous action.
 *
 * The child of a fork of a threaded process may only call async-signal-safe functions,
 * and does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guarded.h"

/* initial-exec: accessed without a call that could allocate. */
static __thread struct {
	sigjmp_buf back;
	bool active;
	struct uffd_signal signal;
} guard __attribute__((tls_model("initial-exec")));

static const int signals[] = { SIGBUS, SIGSEGV };
static struct sigaction previous[2];
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (guard.active && info->si_code > 0) {
		guard.signal = (struct uffd_signal){
			.number = number,
			.code = info->si_code,
			.address = (uintptr_t)info->si_addr,
		};
		siglongjmp(guard.back, 1);
	}
	/* The access is repeated and runs into the previous action. */
	sigaction(number, &previous[number == SIGSEGV], NULL);
	if (info->si_code <= 0)
		syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), number);
}

/* Install again each time: another action may have replaced ours. */
static void install(void)
{
	struct sigaction ours = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	struct sigaction now;

	pthread_mutex_lock(&install_lock);
	for (int i = 0; i < 2; i++) {
		if (sigaction(signals[i], NULL, &now) || now.sa_sigaction == on_signal)
			continue;
		previous[i] = now;
		sigaction(signals[i], &ours, NULL);
	}
	pthread_mutex_unlock(&install_lock);
}

static int guarded_copy(void *to, const void *from, uint64_t length, struct uffd_signal *ret)
{
	memset(&guard.signal, 0, sizeof(guard.signal));
	if (!sigsetjmp(guard.back, 1)) {
		guard.active = true;
		memcpy(to, from, length);
	}
	guard.active = false;
	*ret = guard.signal;
	return ret->number;
}

int uffd_guarded_read(uint64_t address, void *buffer, uint64_t length, struct uffd_signal *ret)
{
	install();
	return guarded_copy(buffer, (const void *)(uintptr_t)address, length, ret);
}

int uffd_guarded_write(uint64_t address, const void *buffer, uint64_t length,
		       struct uffd_signal *ret)
{
	install();
	return guarded_copy((void *)(uintptr_t)address, buffer, length, ret);
}

static bool transfer(int fd, void *buffer, size_t length, bool out)
{
	for (char *at = buffer; length;) {
		ssize_t n = out ? write(fd, at, length) : read(fd, at, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		at += n;
		length -= (size_t)n;
	}
	return true;
}

static char agent_bytes[UFFD_AGENT_BYTES];

static bool serve(int fd)
{
	struct uffd_agent_request request;
	struct uffd_agent_reply reply = { 0 };
	const uint64_t *args = request.args;
	uint64_t length;

	if (!transfer(fd, &request, sizeof(request), false))
		return false;
	length = request.op == UFFD_AGENT_SYSCALL ? 0 : args[1];
	if (length > sizeof(agent_bytes))
		return false;
	switch (request.op) {
	case UFFD_AGENT_READ:
		guarded_copy(agent_bytes, (const void *)(uintptr_t)args[0], length, &reply.signal);
		return transfer(fd, &reply, sizeof(reply), true) &&
		       transfer(fd, agent_bytes, length, true);
	case UFFD_AGENT_WRITE:
		if (!transfer(fd, agent_bytes, length, false))
			return false;
		guarded_copy((void *)(uintptr_t)args[0], agent_bytes, length, &reply.signal);
		return transfer(fd, &reply, sizeof(reply), true);
	case UFFD_AGENT_SYSCALL:
		reply.result = syscall((long)args[0], args[1], args[2], args[3], args[4], args[5],
				       args[6]);
		if (reply.result == -1)
			reply.result = -errno;
		return transfer(fd, &reply, sizeof(reply), true);
	default:
		return false;
	}
}

int uffd_agent_fork(int fd)
{
	pid_t parent = getpid();
	sigset_t all, old;
	long pid;

	install();
	/* No handler of the parent may run in the child. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	/* Not fork(3): its atfork handlers run in the child and take locks. */
	pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (pid) {
		int code = errno;

		pthread_sigmask(SIG_SETMASK, &old, NULL);
		return pid < 0 ? -code : (int)pid;
	}
	/* A faulting access whose signal is blocked would kill the child. */
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	/* Close the parent's userfaultfds and its end of the socket. */
	if (fd)
		syscall(SYS_close_range, 0, fd - 1, 0);
	syscall(SYS_close_range, fd + 1, ~0U, 0);
	if (getppid() == parent)
		while (serve(fd))
			;
	_exit(0);
}
