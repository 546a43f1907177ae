// SPDX-License-Identifier: MIT
/*
 * Write one line before the first page of a range is lost, since a SIGBUS explains nothing.
 *
 * This is not done in Python, because the faulting thread may hold the GIL or be in a
 * signal handler.  Everything here is async-signal-safe.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/resource.h>
#include <unistd.h>

#include "say.h"
#include "base/line.h"

/* One line for each range, but not hundreds for a program that serves hundreds. */
#define SAID_MOST	8

/* strerror(3) is not async-signal-safe. */
static void put_error(struct uffd_line *line, int error, enum uffd_failure_stage stage)
{
	static const struct {
		int error;
		const char *source, *other;
	} texts[] = {
		{ ENODATA, "the source ends before it (was the file truncated?)", NULL },
		{ EFAULT, "EFAULT (unmapped memory, or a truncated file?)", NULL },
		{ EIO, "EIO (input/output error)", NULL },
		{ ENOMEM, "ENOMEM (out of memory)", "ENOMEM (no memory, a full tmpfs, or no huge page is free)" },
		{ EAGAIN, NULL, "EAGAIN (no memory, a full tmpfs, no huge page, or the layout kept"
			       " changing)" },
		{ ETIMEDOUT, "the source has not answered in time", NULL },
		{ EBUSY, "no worker was free: they wait for memory (a huge page?) for other pages",
		  NULL },
		{ EDEADLK, "its page source waits for it by itself: the source reads memory that"
			   " its own handler serves", NULL },
		{ EOWNERDEAD, "the helper process of its handler has ended", NULL },
		{ EMFILE, NULL, "EMFILE (no descriptor is free)" },
		{ ENFILE, NULL, "ENFILE (no descriptor is free)" },
		{ EEXIST, NULL, "EEXIST" },
		{ EINVAL, "EINVAL", "EINVAL" },
		{ EPERM, "EPERM", "EPERM" },
	};
	bool of_source = stage == UFFD_FAILED_SOURCE || stage == UFFD_FAILED_STALLED;

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
		const char *text = of_source || !texts[i].other ? texts[i].source : texts[i].other;

		if (texts[i].error == error) {
			uffd_line_text(line, text ? text : texts[i].other);
			return;
		}
	}
	uffd_line_text(line, "errno ");
	uffd_line_number(line, (uint64_t)error, 10);
}

static void put_place(struct uffd_line *line, const struct uffd_range *range, uint64_t address)
{
	if (!address)
		return;
	uffd_line_text(line, "page ");
	uffd_line_number(line, address, 16);
	if (!range) {
		uffd_line_text(line, ": ");
		return;
	}
	uffd_line_text(line, " (offset ");
	uffd_line_number(line, content_offset(range, address), 16);
	uffd_line_text(line, " of ");
	uffd_line_text(line, range->content->label);
	uffd_line_text(line, "): ");
}

static const char *stage_text(enum uffd_failure_stage stage)
{
	switch (stage) {
	case UFFD_FAILED_SOURCE:	return "its content could not be read: ";
	case UFFD_FAILED_STALLED:	return "";
	case UFFD_FAILED_UNSERVED:	return "this memory is registered, but no handler serves it";
	case UFFD_FAILED_READ:		return "a userfaultfd could not be read: ";
	case UFFD_FAILED_FORK:		return "a fork could not be followed: ";
	default:			return "it could not be put in place: ";
	}
}

static void put_consequence(struct uffd_line *line, const struct uffd_range *range, uint64_t page)
{
	const struct uffd_engine *engine = range->space->engine;

	if (engine->options.on_error == UFFD_ON_ERROR_KILL) {
		uffd_line_text(line, "the process that owns it is killed (on_error=\"kill\")");
	} else if (atomic_load(state_of((struct uffd_range *)range, page)) == UFFD_PAGE_DIRTY) {
		uffd_line_text(line, "threads that write to it wait");
	} else if (engine->options.on_error == UFFD_ON_ERROR_POISON &&
		   has_ioctl(range, _UFFDIO_POISON)) {
		uffd_line_text(line, "it is poisoned: threads that touch it get SIGBUS");
	} else {
		uffd_line_text(line, "it stays missing: threads that touch it wait until stop()");
	}
}

static void say(struct uffd_engine *engine, struct uffd_line *line)
{
	if (engine->options.on_error != UFFD_ON_ERROR_KILL)
		uffd_line_text(line, " (later ones are only counted; stop() raises HandlerError)");
	uffd_line_write(line, engine->options.say_fd);
}

/* Whether this is the first of its kind, and the limit of lines is not reached. */
static bool may_say(struct uffd_engine *engine, _Atomic bool *said)
{
	return engine->options.say_fd >= 0 && !atomic_exchange(said, true) &&
	       atomic_fetch_add(&engine->said_count, 1) < SAID_MOST;
}

void say_page_fails(struct uffd_range *range, uint64_t page, int error,
		    enum uffd_failure_stage stage)
{
	struct uffd_engine *engine = range->space->engine;
	struct uffd_line line = { .used = 0 };

	/* Python reports what a source in Python raised, with the exception. */
	if (stage == UFFD_FAILED_SOURCE && needs_request(range, page) && !stands_in(engine))
		return;
	if (!may_say(engine, &range->content->said))
		return;
	uffd_line_text(&line, "pyuffd: ");
	put_place(&line, range, page);
	uffd_line_text(&line, stage_text(stage));
	put_error(&line, -error, stage);
	uffd_line_text(&line, "; ");
	put_consequence(&line, range, page);
	say(engine, &line);
}

void say_engine_fails(struct uffd_engine *engine, uint64_t address, int error,
		      enum uffd_failure_stage stage, const char *consequence)
{
	struct uffd_line line = { .used = 0 };

	if (!may_say(engine, &engine->said[stage]))
		return;
	uffd_line_text(&line, "pyuffd: ");
	put_place(&line, NULL, address & ~(uint64_t)(BASE_PAGE - 1));
	uffd_line_text(&line, stage_text(stage));
	if (stage != UFFD_FAILED_UNSERVED)
		put_error(&line, -error, stage);
	uffd_line_text(&line, "; ");
	uffd_line_text(&line, consequence);
	say(engine, &line);
}

/* Name the limit that was reached. */
static void put_limit(struct uffd_line *line, int error)
{
	struct rlimit limit;

	if (error != EMFILE || getrlimit(RLIMIT_NOFILE, &limit)) {
		uffd_line_text(line, error == ENFILE
					     ? "the system has reached fs.file-max open files"
					     : "ENOMEM (out of memory)");
		return;
	}
	uffd_line_text(line, "RLIMIT_NOFILE of process ");
	uffd_line_number(line, (uint64_t)getpid(), 10);
	uffd_line_text(line, " is ");
	uffd_line_number(line, limit.rlim_cur, 10);
	uffd_line_text(line, " (hard limit ");
	uffd_line_number(line, limit.rlim_max, 10);
	uffd_line_text(line, "), and no descriptor is free");
}

void say_read_is_put_off(struct uffd_space *space, int error)
{
	struct uffd_engine *engine = space->engine;
	struct uffd_line line = { .used = 0 };

	if (!may_say(engine, &engine->said[UFFD_FAILED_READ]))
		return;
	uffd_line_text(&line, "pyuffd: userfaultfd ");
	uffd_line_number(&line, (uint64_t)space->fd, 10);
	uffd_line_text(&line, " cannot be read: ");
	put_limit(&line, -error);
	uffd_line_text(&line, "; a fork() waits until it can be, and the read is retried");
	uffd_line_write(&line, engine->options.say_fd);
}

void say_helper_ended(struct uffd_engine *engine)
{
	static const char *const now[] = {
		[UFFD_ON_ERROR_POISON] = "missing pages are poisoned as they are touched",
		[UFFD_ON_ERROR_STALL] = "threads that touch missing pages wait until stop() poisons"
					" them",
		[UFFD_ON_ERROR_KILL] = "a process that touches a missing page is killed",
	};
	struct uffd_line line = { .used = 0 };

	/* The thread may be started again. */
	if (engine->options.say_fd < 0 ||
	    atomic_exchange(&engine->said[UFFD_FAILED_NOTHING], true))
		return;
	uffd_line_text(&line, "pyuffd: the helper process ");
	uffd_line_number(&line, (uint64_t)engine->options.helper_pid, 10);
	uffd_line_text(&line, " of a Handler has ended, perhaps killed: ");
	uffd_line_text(&line, now[engine->options.on_error]);
	uffd_line_write(&line, engine->options.say_fd);
}
