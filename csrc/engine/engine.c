// SPDX-License-Identifier: MIT
/* Create and destroy engines. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "alloc.h"
#include "end.h"
#include "engine.h"
#include "inline.h"
#include "native.h"
#include "queue.h"
#include "space.h"
#include "stats.h"
#include "successor.h"
#include "tracebacks.h"

/*
 * Where to map the unreadable page, if the address is free.  An ioctl checks that its source
 * ends within the address space: from here a source may be as long as any mapping.
 */
#define LOW_HINT	UINT64_C(0x100000)

static bool init_descriptors(struct uffd_engine *engine)
{
	engine->wake_fd = engine->stop_fd = engine->watchdog_fd = engine->owner_pidfd = -1;
	engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	return engine->epoll_fd >= 0;
}

static void init_gate(struct uffd_engine *engine)
{
	pthread_rwlockattr_t attributes;

	/* Prefer writers: a pending layout event blocks a thread of the owner. */
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&engine->gate, &attributes);
	pthread_rwlockattr_destroy(&attributes);
}

static void forget_parent(void)
{
	uffd_alloc_forget_parent();
	uffd_file_forget_parent();
	inline_forget_parent();
	uffd_tracebacks_forget_parent();
}

static void watch_forks(void)
{
	pthread_atfork(NULL, NULL, forget_parent);
}

int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret,
		       const char **call_ret)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct uffd_engine *engine;
	void *zeros, *unreadable;
	int r = -ENOMEM;

	*ret = NULL;
	*call_ret = "mmap";
	pthread_once(&once, watch_forks);
	engine = uffd_alloc(sizeof(*engine));
	if (!engine)
		return -ENOMEM;
	engine->options = *options;
	atomic_store(&engine->is_unwatched, !options->watch_owner);
	engine->table = options->is_inline ? &uffd_inline_table : NULL;
	init_gate(engine);
	pthread_mutex_init(&engine->spaces_lock, NULL);
	pthread_mutex_init(&engine->requests_lock, NULL);
	pthread_mutex_init(&engine->await_lock, NULL);
	pthread_mutex_init(&engine->lost_lock, NULL);
	pthread_mutex_init(&engine->drop_lock, NULL);
	pthread_cond_init(&engine->requests_changed, NULL);
	pthread_cond_init(&engine->populates_changed, NULL);
	TAILQ_INIT(&engine->queued);
	TAILQ_INIT(&engine->taken);
	TAILQ_INIT(&engine->promised);
	LIST_INIT(&engine->spaces);
	atomic_store(&engine->next_id, 1);
	pthread_mutex_init(&engine->keeper_lock, NULL);
	pthread_mutex_init(&engine->registered_lock, NULL);
	pthread_mutex_init(&engine->fault_log_lock, NULL);
	engine->shared = options->shared
		? options->shared
		: uffd_alloc(uffd_engine_shared_size(options->fault_log));
	if (engine->shared && options->fault_log)
		fault_log_open(engine, engine->shared + 1);
	zeros = mmap(NULL, ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	engine->zeros = zeros == MAP_FAILED ? NULL : zeros;
	unreadable = mmap((void *)LOW_HINT, BASE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	engine->unreadable = unreadable == MAP_FAILED ? NULL : unreadable;
	if (!init_descriptors(engine)) {
		r = -errno;
		*call_ret = "epoll_create1";
	} else if (engine->shared && engine->zeros && engine->unreadable) {
		r = space_create(engine, options->fd, false, options->layout_events,
				 options->owner_pid, NEXT_NUMBER, &engine->primary);
		*call_ret = r == -ENOMEM ? NULL : "pidfd_open";
	}
	if (r == 0) {
		*call_ret = "epoll_ctl";
		r = watch_space(engine, engine->primary);
	}
	if (r) {
		uffd_engine_destroy(engine);
		return r;
	}
	*ret = engine;
	return 0;
}

/* All ranges must be taken out, the driver stopped, and no thread inside. */
void uffd_engine_destroy(struct uffd_engine *engine)
{
	const void *huge_zeros = atomic_load(&engine->huge_zeros);
	struct uffd_space *space;

	free_lost(engine);
	while ((space = LIST_FIRST(&engine->spaces)))
		space_retire(space);
	free_requests(engine);
	native_close(engine);
	if (huge_zeros)
		munmap((void *)(uintptr_t)huge_zeros, HUGE_ZEROS_SIZE);
	if (engine->zeros)
		munmap((void *)(uintptr_t)engine->zeros, ZEROS_SIZE);
	if (engine->unreadable)
		munmap((void *)(uintptr_t)engine->unreadable, BASE_PAGE);
	if (engine->epoll_fd >= 0)
		close(engine->epoll_fd);
	pthread_cond_destroy(&engine->requests_changed);
	pthread_cond_destroy(&engine->populates_changed);
	pthread_mutex_destroy(&engine->requests_lock);
	pthread_mutex_destroy(&engine->await_lock);
	pthread_mutex_destroy(&engine->lost_lock);
	pthread_mutex_destroy(&engine->drop_lock);
	pthread_mutex_destroy(&engine->spaces_lock);
	pthread_rwlock_destroy(&engine->gate);
	pthread_mutex_destroy(&engine->keeper_lock);
	pthread_mutex_destroy(&engine->fault_log_lock);
	pthread_mutex_destroy(&engine->registered_lock);
	uffd_free(engine->deferred.faults);
	uffd_free(engine->strays.faults);
	uffd_free(engine->crowd.faults);
	if (!engine->options.shared)
		uffd_free(engine->shared);
	uffd_free(engine);
}

int uffd_engine_discard(struct uffd_engine **engine)
{
	if (*engine && uffd_engine_is_deserted(*engine)) {
		uffd_engine_destroy(*engine);
		*engine = NULL;
	}
	return !*engine;
}
