// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <string.h>
#include <ucontext.h>

#include "access.h"
#include "sigbus.h"

struct access {
	uint64_t to;
	uint64_t from;
	uint64_t length;
	uint64_t step;
	int value;
};

/* initial-exec: accessed without a call that could allocate. */
static __thread struct {
	sigjmp_buf back;
	volatile bool active;
	volatile uint64_t address;
	sigset_t mask;
	bool looked;	/* `blocks` is known */
	bool blocks;	/* the thread blocks SIGBUS */
} guard __attribute__((tls_model("initial-exec")));

/* In the signal handler: does not return if the access is guarded. */
static void escape(const siginfo_t *info, const void *context)
{
	if (!guard.active || info->si_code <= 0)
		return;
	guard.active = false;
	guard.address = (uint64_t)(uintptr_t)info->si_addr;
	guard.mask = ((const ucontext_t *)context)->uc_sigmask;
	siglongjmp(guard.back, 1);
}

/*
 * A SIGBUS raised by a fault kills a thread that blocks it.  Check only once: a system
 * call for each access costs as much as the access.
 */
static void set_sigbus(int how)
{
	sigset_t only, old;

	sigemptyset(&only);
	sigaddset(&only, SIGBUS);
	pthread_sigmask(how, &only, &old);
	if (!guard.looked)
		guard.blocks = sigismember(&old, SIGBUS);
	guard.looked = true;
}

static _Atomic bool unguarded;

void uffd_shim_unguard(void)
{
	atomic_store(&unguarded, true);
}

static uint64_t guarded(void (*touch)(const struct access *), const struct access *access)
{
	if (atomic_load_explicit(&unguarded, memory_order_relaxed)) {
		touch(access);
		return 0;
	}
	if (!guard.looked || guard.blocks)
		set_sigbus(SIG_UNBLOCK);
	uffd_sigbus_enter(escape);
	guard.address = 0;
	/* Do not save the mask, which costs a system call: the handler keeps it. */
	if (!sigsetjmp(guard.back, 0)) {
		guard.active = true;
		atomic_signal_fence(memory_order_seq_cst);
		touch(access);
		atomic_signal_fence(memory_order_seq_cst);
		guard.active = false;
	} else {
		pthread_sigmask(SIG_SETMASK, &guard.mask, NULL);
	}
	uffd_sigbus_leave();
	if (guard.blocks)
		set_sigbus(SIG_BLOCK);
	return guard.address;
}

static void copy(const struct access *it)
{
	memcpy((void *)(uintptr_t)it->to, (const void *)(uintptr_t)it->from, it->length);
}

static void fill(const struct access *it)
{
	memset((void *)(uintptr_t)it->to, it->value, it->length);
}

static void touch_to_read(const struct access *it)
{
	for (uint64_t offset = 0; offset < it->length; offset += it->step)
		(void)*(volatile const uint8_t *)(uintptr_t)(it->from + offset);
}

static void touch_to_write(const struct access *it)
{
	/* Add 0 atomically: a write fault that keeps what other threads write. */
	for (uint64_t offset = 0; offset < it->length; offset += it->step)
		__atomic_fetch_add((uint8_t *)(uintptr_t)(it->to + offset), 0, __ATOMIC_RELAXED);
}

uint64_t uffd_shim_read_memory(void *dst, uint64_t src, uint64_t length)
{
	return guarded(copy, &(struct access){
		.to = (uint64_t)(uintptr_t)dst, .from = src, .length = length });
}

uint64_t uffd_shim_write_memory(uint64_t dst, const void *src, uint64_t length)
{
	return guarded(copy, &(struct access){
		.to = dst, .from = (uint64_t)(uintptr_t)src, .length = length });
}

uint64_t uffd_shim_fill_memory(uint64_t dst, int value, uint64_t length)
{
	return guarded(fill, &(struct access){ .to = dst, .value = value, .length = length });
}

uint64_t uffd_shim_touch_read(uint64_t start, uint64_t length, uint64_t step)
{
	return guarded(touch_to_read,
		       &(struct access){ .from = start, .length = length, .step = step });
}

uint64_t uffd_shim_touch_write(uint64_t start, uint64_t length, uint64_t step)
{
	return guarded(touch_to_write,
		       &(struct access){ .to = start, .length = length, .step = step });
}
