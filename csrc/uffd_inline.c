// SPDX-License-Identifier: MIT
/*
 * The inline driver: UFFD_FEATURE_SIGBUS turns a fault into a SIGBUS in the
 * faulting thread, and the handler below resolves it there: no hand-over, and no
 * question of who holds which lock.
 *
 * The handler takes no lock and allocates nothing.  It runs with every signal
 * blocked, so that no other handler can fault on top of it, and passes each
 * SIGBUS that is not ours on to the action that was there before.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "uffd_engine_internal.h"

/* Bits of the page-fault error code, as the CPU pushed it (REG_ERR). */
#define FAULT_PRESENT		(1u << 0)
#define FAULT_WRITE		(1u << 1)

/*
 * The same thread faulting this often on one address, with the page there each
 * time, is a SIGBUS that we cannot resolve.
 */
#define REPEAT_LIMIT		1000

struct uffd_table uffd_inline_table = UFFD_TABLE_INIT;

static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned int users;
static struct sigaction previous;
/*
 * What was there before ours the first time.  An action that was put on top of
 * ours and then got ours on top again (`displaced`) will raise SIGBUS once more
 * to reach the one below it: that must not go round in a circle.
 */
static struct sigaction original;
static bool displaced;

/* initial-exec: reached without a call that could allocate. */
static __thread struct {
	uint64_t address;
	unsigned int count;
	bool passed_on;
} repeated __attribute__((tls_model("initial-exec")));

static void die_by_default(const siginfo_t *info)
{
	struct sigaction action = { .sa_handler = SIG_DFL };

	sigaction(SIGBUS, &action, NULL);
	/* A fault comes back by itself; a SIGBUS that was sent must be sent again. */
	if (info->si_code <= 0)
		syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), SIGBUS);
}

/* What the kernel would have done for the action that was installed before ours. */
static void pass_on(int number, siginfo_t *info, void *context)
{
	/* An action that was disabled under us returns, and the same SIGBUS comes again. */
	bool again = displaced && repeated.passed_on &&
		     (info->si_code <= 0 || repeated.address == (uint64_t)(uintptr_t)info->si_addr);
	struct sigaction action = again ? original : previous;
	const ucontext_t *interrupted = context;
	sigset_t mask = interrupted->uc_sigmask;

	repeated.passed_on = true;
	repeated.address = (uint64_t)(uintptr_t)info->si_addr;
	if (action.sa_handler == SIG_IGN && info->si_code <= 0)
		return;
	if (action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN) {
		die_by_default(info);
		return;
	}
	if (action.sa_flags & SA_RESETHAND)
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

/* The signal does not say what kind of fault it was: the CPU and the page's state do. */
static enum uffd_fault_kind first_guess(const struct uffd_range *range, uint64_t error)
{
	bool write = error & FAULT_WRITE;

	if ((error & FAULT_PRESENT) && write && (range->mode & UFFDIO_REGISTER_MODE_WP))
		return UFFD_KIND_WP;
	if (range->mode & UFFDIO_REGISTER_MODE_MISSING && !range->content->writes_cache)
		return UFFD_KIND_MISSING;
	if (range->mode & UFFDIO_REGISTER_MODE_MINOR)
		return UFFD_KIND_MINOR;
	return UFFD_KIND_WP;
}

/* The page was there for one kind of fault: which other kind can it have been? */
static bool next_guess(const struct uffd_range *range, uint64_t error, enum uffd_fault_kind *kind)
{
	if (*kind == UFFD_KIND_MISSING && (range->mode & UFFDIO_REGISTER_MODE_MINOR)) {
		*kind = UFFD_KIND_MINOR;
		return true;
	}
	if (*kind != UFFD_KIND_WP && (error & FAULT_WRITE) &&
	    (range->mode & UFFDIO_REGISTER_MODE_WP)) {
		*kind = UFFD_KIND_WP;
		return true;
	}
	return false;
}

/* The rest of the chunk; in this thread there is nobody to hand it to. */
static void prefetch_now(struct uffd_range *range, struct uffd_hold *hold, uint64_t page)
{
	struct uffd_engine *engine = range->space->engine;
	struct fill_run run = { 0 };
	uint64_t end;

	prefetch_span(range, page, &run.past, &end);
	if (hold)
		uffd_hold_move(hold, run.past, end);
	while (run.past < end && !run.error) {
		run = fill_absent(range, run.past, end);
		count(engine, COUNTER(prefetched_pages), run.filled >> range->page_shift);
	}
}

/* Returns false when the SIGBUS is not ours after all. */
static bool resolve_inline(struct uffd_range *range, struct uffd_hold *hold, uint64_t address,
			   uint64_t error, uint32_t thread_id)
{
	static const uint64_t flags_of[] = {
		[UFFD_KIND_MISSING] = 0,
		[UFFD_KIND_WP] = UFFD_PAGEFAULT_FLAG_WP,
		[UFFD_KIND_MINOR] = UFFD_PAGEFAULT_FLAG_MINOR,
	};
	struct uffd_engine *engine = range->space->engine;
	uint64_t page = page_of(range, address);
	enum uffd_fault_kind kind = first_guess(range, error);
	uint64_t began = uffd_now_ns();
	unsigned int attempt = 0;
	enum outcome outcome;

	for (;;) {
		outcome = resolve_page(range, page, kind);
		if (outcome == OUTCOME_PRESENT && next_guess(range, error, &kind))
			continue;
		/* Not in the page cache, where it was once: dropped. */
		if (outcome == OUTCOME_GONE && kind == UFFD_KIND_MINOR &&
		    range->mode & UFFDIO_REGISTER_MODE_MISSING) {
			kind = UFFD_KIND_MISSING;
			continue;
		}
		if (outcome == OUTCOME_IN_FLIGHT) {
			uffd_back_off(attempt++);
			/* Who had it may have left what we came for. */
			kind = first_guess(range, error);
			continue;
		}
		/* There again and again, and yet it faults: there is no huge page for it. */
		if (outcome == OUTCOME_PRESENT && is_huge(range) && kind != UFFD_KIND_MINOR &&
		    repeated.address == address && repeated.count >= EXISTS_LIMIT)
			outcome = OUTCOME_DEFER;
		if (outcome != OUTCOME_DEFER)
			break;
		count(engine, COUNTER(deferred), 1);
		if (uffd_now_ns() - began > engine->options.retry_limit_ns) {
			outcome = apply_on_error(range, page, -EAGAIN, UFFD_FAILED_RESOLVE, 0);
			break;
		}
		uffd_back_off(attempt++);
		count(engine, COUNTER(retried), 1);
	}
	/* No content: SIGBUS it is, also where the kernel calls poison BUS_ADRERR. */
	if (outcome == OUTCOME_POISONED)
		return false;
	if (outcome == OUTCOME_RESOLVED) {
		if (engine->options.prefetch && kind != UFFD_KIND_WP)
			prefetch_now(range, hold, page);
		note_fault(engine, address,
			   flags_of[kind] | (error & FAULT_WRITE ? UFFD_PAGEFAULT_FLAG_WRITE : 0),
			   thread_id, began);
		repeated.count = 0;
		repeated.passed_on = false;
		return true;
	}
	if (repeated.address != address)
		repeated.count = 0;
	repeated.address = address;
	return ++repeated.count < REPEAT_LIMIT;
}

/* The caller is a reader of the table; when this returns it is not any more. */
static bool resolve_outside(struct uffd_range *range, unsigned int shard, uint64_t address,
			    uint64_t error)
{
	uint64_t page = page_of(range, address);
	uint32_t thread_id = (uint32_t)syscall(SYS_gettid);
	struct uffd_hold *hold = leave_with(&uffd_inline_table, shard, range, page,
					    page + range->page_size, thread_id);
	bool ours = resolve_inline(range, hold, address, error, thread_id);

	let_go(&uffd_inline_table, shard, hold);
	return ours;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	uint64_t error = (uint64_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR];
	int saved_errno = errno;
	bool ours = false;

	/*
	 * BUS_MCEERR_AR is a poisoned page.  A kernel without CONFIG_MEMORY_FAILURE
	 * says BUS_ADRERR for that too (measured): then the page's state tells.
	 */
	if (info->si_code == BUS_ADRERR) {
		unsigned int shard = uffd_table_enter(&uffd_inline_table, current_cpu());
		struct uffd_range *range = uffd_table_find(&uffd_inline_table, address);

		if (range)
			ours = resolve_outside(range, shard, address, error);
		else
			uffd_table_leave(&uffd_inline_table, shard);
	}
	if (!ours)
		pass_on(number, info, context);
	errno = saved_errno;
}

/*
 * A fork's child has the action and the table, but the ranges are its parent's, and
 * a thread that does not exist here may have been inside.  What handlers the child
 * makes are its first.
 */
void inline_forget_parent(void)
{
	pthread_mutex_init(&install_lock, NULL);
	users = 0;
	uffd_table_init(&uffd_inline_table);
}

static bool is_ours(const struct sigaction *action)
{
	return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_sigbus;
}

static int install(void)
{
	struct sigaction action = { .sa_flags = SA_SIGINFO | SA_ONSTACK };
	struct sigaction old;

	if (sigaction(SIGBUS, NULL, &old))
		return -errno;
	if (is_ours(&old))
		return 0;
	if (users == 0)
		original = old;
	displaced = users > 0;
	previous = old;
	action.sa_sigaction = on_sigbus;
	sigfillset(&action.sa_mask);
	return sigaction(SIGBUS, &action, NULL) ? -errno : 0;
}

int uffd_inline_start(struct uffd_engine *engine)
{
	int r;

	(void)engine;
	pthread_mutex_lock(&install_lock);
	r = install();
	if (r == 0)
		users++;
	pthread_mutex_unlock(&install_lock);
	return r;
}

void uffd_inline_stop(struct uffd_engine *engine, uint32_t to_original)
{
	struct sigaction current;

	(void)engine;
	pthread_mutex_lock(&install_lock);
	/* An action put on top of ours may call it: then it stays, and passes all on. */
	if (--users == 0 && sigaction(SIGBUS, NULL, &current) == 0 && is_ours(&current))
		sigaction(SIGBUS, to_original ? &original : &previous, NULL);
	pthread_mutex_unlock(&install_lock);
}

int uffd_inline_is_installed(void)
{
	struct sigaction current;

	return sigaction(SIGBUS, NULL, &current) == 0 && is_ours(&current);
}

int uffd_inline_reinstall(void)
{
	int r;

	pthread_mutex_lock(&install_lock);
	r = install();
	pthread_mutex_unlock(&install_lock);
	return r;
}
