/* SPDX-License-Identifier: MIT */
/*
 * fault KIND WAY PAGES THREADS CPU HANDLER_CPU: latency of one 4 KiB fault.
 *
 * KIND         missing   UFFDIO_COPY into anonymous memory
 *              wp        UFFDIO_WRITEPROTECT of one page of populated anonymous memory
 *              minor     UFFDIO_CONTINUE in a memfd filled through a second mapping
 * WAY          blocking  a handler thread in poll(2), then read(2): the loop of userfaultfd(2)
 *              reading   a handler thread in read(2) on a blocking descriptor: cannot be stopped,
 *                        but saves a system call
 *              spinning  a handler thread that calls read(2) on a non-blocking descriptor all the time
 *              sigbus    UFFD_FEATURE_SIGBUS, resolved by the faulting thread itself
 * THREADS      faulting threads; each has an equal share of the pages
 * CPU          CPU of the first faulting thread (the others run on the CPUs after it), -1: any
 * HANDLER_CPU  CPU of the handler thread, -1: any
 */
#define _GNU_SOURCE
#include "bench.h"
#include "toucher.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum kind { MISSING, WP, MINOR };
enum way { BLOCKING, READING, SPINNING, SIGBUS_INLINE };

struct fault {
	enum kind kind;
	enum way way;
	uint64_t pages;
	uint32_t threads;
	int cpu;
	int handler_cpu;
	uint32_t *order;
	uint8_t *source;
	/* of one round */
	int uffd;
	uint8_t *start;
};

static struct fault fault;

static void resolve(uint64_t address)
{
	uint64_t page = address & ~(uint64_t)(SMALL_PAGE - 1);

	if (fault.kind == MISSING) {
		struct uffdio_copy copy = {
			.dst = page,
			.src = (uintptr_t)fault.source + (page - (uintptr_t)fault.start),
			.len = SMALL_PAGE,
		};

		if (ioctl(fault.uffd, UFFDIO_COPY, &copy))
			die("UFFDIO_COPY");
	} else if (fault.kind == WP) {
		struct uffdio_writeprotect wp = {
			.range = { .start = page, .len = SMALL_PAGE },
		};

		if (ioctl(fault.uffd, UFFDIO_WRITEPROTECT, &wp))
			die("UFFDIO_WRITEPROTECT");
	} else {
		struct uffdio_continue cont = {
			.range = { .start = page, .len = SMALL_PAGE },
		};

		if (ioctl(fault.uffd, UFFDIO_CONTINUE, &cont))
			die("UFFDIO_CONTINUE");
	}
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	int saved = errno;

	(void)signal;
	(void)context;
	resolve((uintptr_t)info->si_addr);
	errno = saved;
}

/* Every page faults once, so the handler ends after as many faults as there are pages. */
static void *handler_thread(void *arg)
{
	(void)arg;
	for (uint64_t resolved = 0; resolved < fault.pages;) {
		struct uffd_msg msg;
		ssize_t n;

		if (fault.way == BLOCKING) {
			struct pollfd pfd = { .fd = fault.uffd, .events = POLLIN };

			if (poll(&pfd, 1, -1) != 1)
				die("poll");
		}
		n = read(fault.uffd, &msg, sizeof(msg));
		if (n == -1 && errno == EAGAIN)
			continue;
		if (n != sizeof(msg) || msg.event != UFFD_EVENT_PAGEFAULT)
			die("read");
		resolve(msg.arg.pagefault.address);
		resolved++;
	}
	return NULL;
}

static void start_handler(pthread_t *thread)
{
	pthread_attr_t attr;

	pthread_attr_init(&attr);
	if (fault.handler_cpu >= 0) {
		cpu_set_t cpus;

		CPU_ZERO(&cpus);
		CPU_SET(fault.handler_cpu, &cpus);
		pthread_attr_setaffinity_np(&attr, sizeof(cpus), &cpus);
	}
	errno = pthread_create(thread, &attr, handler_thread, NULL);
	if (errno)
		die("pthread_create");
	pthread_attr_destroy(&attr);
}

static void touch_all(uint64_t *samples, uint64_t *wall_ns_ret)
{
	struct touch_job jobs[fault.threads];
	uint64_t share = fault.pages / fault.threads;

	for (uint32_t i = 0; i < fault.threads; i++) {
		jobs[i] = (struct touch_job){
			.base = fault.start,
			.order = fault.order + i * share,
			.ns = samples + i * share,
			.count = share,
			.page_size = SMALL_PAGE,
			.write = fault.kind == WP,
			.cpu = fault.cpu < 0 ? -1 : fault.cpu + (int)i,
		};
	}
	if (touch_run(jobs, fault.threads, wall_ns_ret))
		die("touch_run");
}

static uint64_t run_round(void *context, uint64_t *samples)
{
	static const uint64_t modes[] = {
		UFFDIO_REGISTER_MODE_MISSING,
		UFFDIO_REGISTER_MODE_WP,
		UFFDIO_REGISTER_MODE_MINOR,
	};
	enum memory memory = fault.kind == MINOR ? SHMEM : ANON;
	uint64_t length = fault.pages * SMALL_PAGE, wall_ns;
	uint8_t *alias = NULL;
	pthread_t handler;
	int fd;

	(void)context;
	fault.uffd = open_uffd(fault.way == BLOCKING || fault.way == SPINNING ? O_NONBLOCK : 0,
			       fault.way == SIGBUS_INLINE ? UFFD_FEATURE_SIGBUS : 0);
	fault.start = map_memory(memory, length, &fd);
	if (fault.kind == MINOR) {
		alias = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (alias == MAP_FAILED)
			die("mmap of the alias");
		memset(alias, 1, length);
	} else {
		memset(fault.start, 1, length);
	}
	if (fault.kind == MISSING)
		release_memory(memory, fault.start, length);
	register_range(fault.uffd, fault.start, length, modes[fault.kind]);
	if (fault.kind == WP)
		write_protect(fault.uffd, fault.start, length);

	if (fault.way == SIGBUS_INLINE) {
		touch_all(samples, &wall_ns);
	} else {
		start_handler(&handler);
		touch_all(samples, &wall_ns);
		pthread_join(handler, NULL);
	}

	munmap(fault.start, length);
	if (alias)
		munmap(alias, length);
	if (fd >= 0)
		close(fd);
	close(fault.uffd);
	return wall_ns;
}

static int lookup(const char *name, const char *const *names)
{
	for (int i = 0; names[i]; i++)
		if (!strcmp(name, names[i]))
			return i;
	die("unknown word %s", name);
}

int main(int argc, char **argv)
{
	static const char *const kinds[] = { "missing", "wp", "minor", NULL };
	static const char *const ways[] = { "blocking", "reading", "spinning", "sigbus", NULL };
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	int fd;

	if (argc != 7)
		die("usage: fault KIND WAY PAGES THREADS CPU HANDLER_CPU");
	fault.kind = (enum kind)lookup(argv[1], kinds);
	fault.way = (enum way)lookup(argv[2], ways);
	fault.pages = strtoull(argv[3], NULL, 0);
	fault.threads = (uint32_t)strtoul(argv[4], NULL, 0);
	fault.cpu = atoi(argv[5]);
	fault.handler_cpu = atoi(argv[6]);
	if (!fault.threads || !fault.pages || fault.pages % fault.threads)
		die("the threads must share the pages evenly");
	fault.order = calloc(fault.pages, sizeof(*fault.order));
	if (!fault.order)
		die("calloc");
	touch_order(fault.order, fault.pages, TOUCH_SEED);
	fault.source = map_memory(ANON, fault.pages * SMALL_PAGE, &fd);
	memset(fault.source, 1, fault.pages * SMALL_PAGE);
	if (fault.way == SIGBUS_INLINE && sigaction(SIGBUS, &action, NULL))
		die("sigaction");
	serve_rounds(run_round, NULL, fault.pages);
	return 0;
}
