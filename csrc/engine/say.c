// SPDX-License-Identifier: MIT
/*
 * One line on stderr before the first page of a serving is lost: SIGBUS says nothing.
 *
 * Written here and not from Python, since the thread that waits may hold the GIL, or
 * be in a signal handler: everything is async-signal-safe.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/resource.h>
#include <unistd.h>

#include "say.h"
#include "base/line.h"

/* Each serving has its line, but a program that serves hundreds does not want hundreds. */
#define SAID_MOST	8

/* strerror(3) is not for signal handlers. */
static void put_error(struct uffd_line *line, int error, enum uffd_failure_stage stage)
{
	static const struct {
		int error;
		const char *source, *other;
	} texts[] = {
		{ ENODATA, "the source ends before it (a file that was truncated?)", NULL },
		{ EFAULT, "EFAULT (memory that is unmapped, or a file that was truncated?)", NULL },
		{ EIO, "EIO (input/output error)", NULL },
		{ ENOMEM, "ENOMEM (out of memory)", "ENOMEM (no memory, or no huge page is free)" },
		{ EAGAIN, NULL, "EAGAIN (no memory, no huge page, or the layout kept changing)" },
		{ ETIMEDOUT, "the source has not answered in time", NULL },
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
	case UFFD_FAILED_UNSERVED:	return "its range is registered, and no handler serves it";
	case UFFD_FAILED_READ:		return "a userfaultfd could not be read: ";
	case UFFD_FAILED_FORK:		return "a fork could not be followed: ";
	default:			return "it could not be put in place: ";
	}
}

static void put_consequence(struct uffd_line *line, const struct uffd_range *range, uint64_t page)
{
	const struct uffd_engine *engine = range->space->engine;

	if (engine->options.on_error == UFFD_ON_ERROR_KILL) {
		uffd_line_text(line, "the process whose memory it is is killed (on_error=\"kill\")");
	} else if (atomic_load(state_of((struct uffd_range *)range, page)) == UFFD_PAGE_DIRTY) {
		uffd_line_text(line, "whoever writes to it waits");
	} else if (engine->options.on_error == UFFD_ON_ERROR_POISON &&
		   has_ioctl(range, _UFFDIO_POISON)) {
		uffd_line_text(line, "it is poisoned, and whoever touches it gets SIGBUS");
	} else {
		uffd_line_text(line, "it stays missing, and whoever touches it waits until stop()");
	}
}

static void say(struct uffd_engine *engine, struct uffd_line *line)
{
	if (engine->options.on_error != UFFD_ON_ERROR_KILL)
		uffd_line_text(line, " (the next ones are counted; stop() raises HandlerError)");
	uffd_line_write(line, engine->options.say_fd);
}

/* Whether this is the first of its kind, and there have not been too many. */
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

	/* What a source in Python raised is said there, with the exception. */
	if (stage == UFFD_FAILED_SOURCE && needs_request(range))
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

/* Which limit it is, and what to do. */
static void put_limit(struct uffd_line *line, int error)
{
	struct rlimit limit;

	if (error != EMFILE || getrlimit(RLIMIT_NOFILE, &limit)) {
		uffd_line_text(line, error == ENFILE
					     ? "the system has as many open files as fs.file-max allows"
					     : "ENOMEM (out of memory)");
		return;
	}
	uffd_line_text(line, "RLIMIT_NOFILE of process ");
	uffd_line_number(line, (uint64_t)getpid(), 10);
	uffd_line_text(line, " is ");
	uffd_line_number(line, limit.rlim_cur, 10);
	uffd_line_text(line, " (its hard limit ");
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
	uffd_line_text(&line, "; a fork() waits until it can, and it is tried again");
	uffd_line_write(&line, engine->options.say_fd);
}
