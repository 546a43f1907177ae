/* SPDX-License-Identifier: MIT */
/* A program with its own SIGBUS handler, for test_inline_signals.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

static volatile int handled;
static volatile uintptr_t last_address;
static struct sigaction before;
static __thread sigjmp_buf back;
static __thread volatile sig_atomic_t armed;

static void on_bus(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	__atomic_fetch_add(&handled, 1, __ATOMIC_SEQ_CST);
	last_address = (uintptr_t)info->si_addr;
	if (info->si_code <= 0)
		return;
	if (armed) {
		armed = 0;
		siglongjmp(back, 1);
	}
	mmap((void *)(last_address & ~(uintptr_t)(PAGE - 1)), PAGE, PROT_READ | PROT_WRITE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

int install(int flags)
{
	struct sigaction action = { .sa_flags = SA_SIGINFO | flags };

	action.sa_sigaction = on_bus;
	sigaddset(&action.sa_mask, SIGUSR2);
	return sigaction(SIGBUS, &action, &before);
}

/* Whether the SIGBUS action is still the one that we installed. */
int is_installed(int flags)
{
	struct sigaction now;

	sigaction(SIGBUS, NULL, &now);
	return now.sa_sigaction == on_bus && (now.sa_flags & ~0x04000000) == (SA_SIGINFO | flags) &&
	       sigismember(&now.sa_mask, SIGUSR2) == 1 && sigismember(&now.sa_mask, SIGUSR1) == 0;
}

int count(void)
{
	return handled;
}

uint64_t address(void)
{
	return last_address;
}

/* The byte at this address, or -1 if the access raised SIGBUS. */
int guarded_read(uint64_t at)
{
	int value = -1;

	armed = 1;
	if (sigsetjmp(back, 1) == 0)
		value = *(volatile unsigned char *)at;
	armed = 0;
	return value;
}

int plain_read(uint64_t at)
{
	return *(volatile unsigned char *)at;
}

/* errno after a fault, if it was 77 before: resolving the fault must not change it. */
int errno_after_read(uint64_t at)
{
	errno = 77;
	*(volatile unsigned char *)at;
	return errno;
}

/* The signals blocked in this thread after the access: bit n - 1 is signal n. */
uint64_t blocked_after_read(uint64_t at)
{
	sigset_t set;
	uint64_t bits = 0;

	*(volatile unsigned char *)at;
	sigprocmask(SIG_BLOCK, NULL, &set);
	memcpy(&bits, &set, sizeof(bits));
	return bits;
}
