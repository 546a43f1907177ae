// SPDX-License-Identifier: MIT
/*
 * The handler takes no lock and allocates nothing.  It runs with all signals blocked, so
 * that no other handler can fault on top of it, and passes each SIGBUS that is not ours
 * on to the previous action.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "sigbus.h"

static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic unsigned int users;
static _Atomic(uffd_sigbus_resolver) resolver;
static _Atomic(uffd_sigbus_escape) escape;
static _Atomic(uffd_sigbus_explainer) explainer;
static struct sigaction previous;
/*
 * The action before our first installation.  If another action was installed over ours
 * and ours over that again (`displaced`), the other one may raise SIGBUS once more to
 * reach the action below it: that must not go round in a circle.
 */
static struct sigaction original;
static bool displaced;
static _Atomic bool in_chain;	/* ours was installed and not removed: another action may call it */

/* initial-exec: accessed without a call that could allocate. */
static __thread struct {
	uint64_t address;
	bool is_set;
} passed_on __attribute__((tls_model("initial-exec")));

static void die_by_default(const siginfo_t *info)
{
	struct sigaction action = { .sa_handler = SIG_DFL };

	sigaction(SIGBUS, &action, NULL);
	/* A fault repeats by itself; a SIGBUS that was sent must be sent again. */
	if (info->si_code <= 0)
		syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), SIGBUS);
}

/* Do what the kernel would do for the previous action. */
static void pass_on(int number, siginfo_t *info, void *context)
{
	/* If the previous action has been disabled it returns, and the same SIGBUS comes again. */
	bool again = displaced && passed_on.is_set &&
		     (info->si_code <= 0 ||
		      passed_on.address == (uint64_t)(uintptr_t)info->si_addr);
	struct sigaction action = again ? original : previous;
	const ucontext_t *interrupted = context;
	sigset_t mask = interrupted->uc_sigmask;

	passed_on.is_set = true;
	passed_on.address = (uint64_t)(uintptr_t)info->si_addr;
	if (action.sa_handler == SIG_IGN && info->si_code <= 0)
		return;
	if (action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN) {
		die_by_default(info);
		return;
	}
	if (action.sa_flags & (int)SA_RESETHAND)
		previous.sa_handler = SIG_DFL;
	sigorset(&mask, &mask, &action.sa_mask);
	if (!(action.sa_flags & SA_NODEFER))
		sigaddset(&mask, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	if (action.sa_flags & SA_SIGINFO)
		action.sa_sigaction(number, info, context);
	else
		action.sa_handler(number);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	uint64_t error = (uint64_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR];
	uffd_sigbus_resolver resolve = atomic_load(&resolver);
	uffd_sigbus_escape leave = atomic_load(&escape);
	uffd_sigbus_explainer explain = atomic_load(&explainer);
	int saved_errno = errno;

	/*
	 * BUS_MCEERR_AR is a poisoned page.  A kernel without CONFIG_MEMORY_FAILURE
	 * reports that as BUS_ADRERR too (measured): then the page's state decides.
	 */
	if (info->si_code == BUS_ADRERR && resolve && resolve(address, error)) {
		passed_on.is_set = false;
	} else {
		if (leave)
			leave(info, context);
		if (explain && info->si_code > 0)
			explain(address);
		pass_on(number, info, context);
	}
	errno = saved_errno;
}

static bool is_ours(const struct sigaction *action)
{
	return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_sigbus;
}

/* With the lock held. */
static int install(void)
{
	struct sigaction action = { .sa_flags = SA_SIGINFO | SA_ONSTACK };
	struct sigaction old;

	if (sigaction(SIGBUS, NULL, &old))
		return -errno;
	if (is_ours(&old))
		return 0;
	if (!in_chain)
		original = old;
	displaced = in_chain;
	previous = old;
	action.sa_sigaction = on_sigbus;
	sigfillset(&action.sa_mask);
	if (sigaction(SIGBUS, &action, NULL))
		return -errno;
	in_chain = true;
	return 0;
}

int uffd_sigbus_reinstall(void)
{
	int r;

	pthread_mutex_lock(&install_lock);
	r = install();
	pthread_mutex_unlock(&install_lock);
	return r;
}

int uffd_sigbus_is_installed(void)
{
	struct sigaction current;

	return sigaction(SIGBUS, NULL, &current) == 0 && is_ours(&current);
}

int uffd_sigbus_acquire(uffd_sigbus_resolver resolve)
{
	int r;

	pthread_mutex_lock(&install_lock);
	r = install();
	if (r == 0) {
		atomic_store(&resolver, resolve);
		atomic_fetch_add(&users, 1);
	}
	pthread_mutex_unlock(&install_lock);
	return r;
}

void uffd_sigbus_release(bool to_original)
{
	struct sigaction current;

	pthread_mutex_lock(&install_lock);
	/* An action installed over ours may call it: then leave ours, which passes all on. */
	if (atomic_fetch_sub(&users, 1) == 1 && sigaction(SIGBUS, NULL, &current) == 0 &&
	    is_ours(&current)) {
		/* A concurrent uffd_sigbus_enter() sees in_chain false, or we see its user. */
		atomic_store(&in_chain, false);
		if (!atomic_load(&users))
			sigaction(SIGBUS, to_original ? &original : &previous, NULL);
		else
			atomic_store(&in_chain, true);
	}
	pthread_mutex_unlock(&install_lock);
}

int uffd_sigbus_explain(uffd_sigbus_explainer explain)
{
	int r;

	pthread_mutex_lock(&install_lock);
	r = install();
	if (r == 0 && !atomic_exchange(&explainer, explain))
		atomic_fetch_add(&users, 1);	/* which never ends */
	pthread_mutex_unlock(&install_lock);
	return r;
}

/*
 * Asking the kernel for the current action costs a fifth of a short access.  An action
 * installed over ours is called first for accesses within this time.
 */
#define TRUSTED_CYCLES	100000

void uffd_sigbus_enter(uffd_sigbus_escape way_out)
{
	static _Atomic uint64_t looked_at;
	uint64_t now = __builtin_ia32_rdtsc();

	atomic_store_explicit(&escape, way_out, memory_order_relaxed);
	/* Count first: a driver that stops leaves the action installed while an access needs it. */
	atomic_fetch_add(&users, 1);
	if (atomic_load(&in_chain) &&
	    now - atomic_load_explicit(&looked_at, memory_order_relaxed) < TRUSTED_CYCLES)
		return;
	if (!uffd_sigbus_is_installed())
		uffd_sigbus_reinstall();
	atomic_store_explicit(&looked_at, now, memory_order_relaxed);
}

void uffd_sigbus_leave(void)
{
	atomic_fetch_sub_explicit(&users, 1, memory_order_release);
}

void uffd_sigbus_forget_parent(void)
{
	pthread_mutex_init(&install_lock, NULL);
	atomic_store(&users, atomic_load(&explainer) ? 1 : 0);
}
