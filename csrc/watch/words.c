// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/tasks.h"
#include "words.h"
#include "base/page.h"

#define PAGEMAP_PRESENT	(1ull << 63)
#define PAGEMAP_WP	(1ull << 57)

static void put_name(struct uffd_line *line, int32_t pid, int32_t thread_id)
{
	char name[32];
	ssize_t n = uffd_task_read_thread(pid, thread_id, "comm", name, sizeof(name));

	uffd_line_text(line, "thread ");
	uffd_line_number(line, (uint64_t)thread_id, 10);
	if (n > 1) {
		name[n - 1] = 0;
		uffd_line_text(line, " (");
		uffd_line_text(line, name);
		uffd_line_text(line, ")");
	}
}

static void put_thread(struct uffd_line *line, int32_t pid, int32_t thread_id)
{
	put_name(line, pid, thread_id);
	uffd_line_text(line, " of process ");
	uffd_line_number(line, (uint64_t)(pid ? pid : getpid()), 10);
}

static bool is_protected(int32_t pid, uint64_t page)
{
	int fd = uffd_task_open(pid, "pagemap", 0);
	uint64_t entry = 0;

	if (fd < 0)
		return false;
	if (pread(fd, &entry, sizeof(entry), (off_t)(page / BASE_PAGE * sizeof(entry))) !=
	    sizeof(entry))
		entry = 0;
	close(fd);
	return (entry & PAGEMAP_PRESENT) && (entry & PAGEMAP_WP);
}

/* A line of /proc/PID/maps: "start-end perms offset device inode   name". */
static bool put_mapping(struct uffd_line *line, char *text, uint64_t page)
{
	char *at, *name = strchr(text, '/');
	uint64_t start = strtoull(text, &at, 16), end;

	if (*at != '-')
		return false;
	end = strtoull(at + 1, NULL, 16);
	if (page < start || page >= end)
		return false;
	uffd_line_text(line, " of [");
	uffd_line_number(line, start, 16);
	uffd_line_text(line, ", ");
	uffd_line_number(line, end, 16);
	uffd_line_text(line, ")");
	if (name) {
		uffd_line_text(line, " (");
		uffd_line_text(line, name);
		uffd_line_text(line, ")");
	}
	return true;
}

static void put_region(struct uffd_line *line, int32_t pid, uint64_t page)
{
	int fd = uffd_task_open(pid, "maps", 0);
	char text[4096];
	size_t used = 0;
	ssize_t n = 0;

	if (fd < 0)
		return;
	do {
		char *from = text, *end;

		text[used] = 0;
		for (; (end = strchr(from, '\n')); from = end + 1) {
			*end = 0;
			if (put_mapping(line, from, page)) {
				close(fd);
				return;
			}
		}
		used -= (size_t)(from - text);
		memmove(text, from, used);
		/* A name longer than the buffer: the rest of its line does not parse. */
		if (used == sizeof(text) - 1)
			used = 0;
		n = read(fd, text + used, sizeof(text) - 1 - used);
		used += n > 0 ? (size_t)n : 0;
	} while (n > 0);
	close(fd);
}

static void put_page(struct uffd_line *line, int32_t pid, uint64_t page)
{
	uffd_line_text(line, is_protected(pid, page) ? "write-protected page " : "page ");
	uffd_line_number(line, page, 16);
	put_region(line, pid, page);
}

static void put_call(struct uffd_line *line, int32_t pid, int32_t thread_id)
{
	static const struct {
		long number;
		bool has_range;
		const char *name;
	} calls[] = {
		{ SYS_fork, false, "fork" },	{ SYS_vfork, false, "vfork" },
		{ SYS_clone, false, "fork" },	{ SYS_clone3, false, "fork" },
		{ SYS_munmap, true, "munmap" }, { SYS_madvise, true, "madvise" },
		{ SYS_mremap, true, "mremap" }, { SYS_mmap, true, "mmap" },
		{ SYS_shmdt, false, "shmdt" },	{ SYS_shmat, false, "shmat" },
		{ SYS_brk, false, "brk" },
	};
	char text[256], *at;
	uint64_t start, length;
	long number;

	if (uffd_task_read_thread(pid, thread_id, "syscall", text, sizeof(text)) <= 0) {
		uffd_line_text(line, "a system call");
		return;
	}
	number = strtol(text, &at, 10);
	start = strtoull(at, &at, 16);
	length = strtoull(at, &at, 16);
	for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
		if (calls[i].number != number)
			continue;
		uffd_line_text(line, calls[i].name);
		uffd_line_text(line, "(");
		if (calls[i].has_range) {
			uffd_line_number(line, start, 16);
			uffd_line_text(line, ", ");
			uffd_line_number(line, length, 16);
		}
		uffd_line_text(line, ")");
		return;
	}
	uffd_line_text(line, "system call ");
	uffd_line_number(line, (uint64_t)number, 10);
}

static void put_seconds(struct uffd_line *line, uint64_t seconds)
{
	uffd_line_text(line, " has waited for ");
	uffd_line_number(line, seconds, 10);
	uffd_line_text(line, " s");
}

/* Nothing tells which thread holds the GIL: say what is known of the others. */
static void put_gil(struct uffd_line *line, const struct uffd_watched *watched,
		    const struct uffd_words_wait *wait)
{
	uffd_line_text(line, wait->gil == UFFD_WORDS_READER ? ", and " : ", while ");
	put_name(line, 0, wait->gil_thread_id);
	if (wait->gil == UFFD_WORDS_READER) {
		uffd_line_text(line, ", which reads userfaultfd ");
		uffd_line_number(line, (uint64_t)watched->fd, 10);
		uffd_line_text(line, ",");
	}
	uffd_line_text(line, " waits for the GIL: a loop in Python cannot resolve the fault of a"
			     " thread that holds the GIL. Use a Handler, or access the memory by"
			     " region.read() and the like, which release it");
}

static void put_advice(struct uffd_line *line, const struct uffd_watched *watched,
		       const struct uffd_words_wait *wait)
{
	int32_t sent_to = watched->sent_to;

	if (wait->gil == UFFD_WORDS_READER && watched->reader == UFFD_WATCH_USER) {
		put_gil(line, watched, wait);
		return;
	}
	uffd_line_text(line, ", and nobody reads userfaultfd ");
	uffd_line_number(line, (uint64_t)watched->fd, 10);
	if (watched->reader == UFFD_WATCH_HANDLER) {
		uffd_line_text(line, ": its Handler has not been started, call start()");
	} else if (sent_to) {
		uffd_line_text(line, ": it was sent to ");
		uffd_line_text(line, sent_to > 0 ? "process " : "another process");
		if (sent_to > 0)
			uffd_line_number(line, (uint64_t)sent_to, 10);
		uffd_line_text(line, uffd_task_has_exited(sent_to)
					     ? ", which has exited"
					     : ", which has not read it either");
	} else if (wait->gil) {
		put_gil(line, watched, wait);
	} else {
		uffd_line_text(line, ": call read_events() and handle the messages, or"
				     " serve it with a Handler");
	}
}

static void put_others(struct uffd_line *line, uint32_t others)
{
	if (others) {
		uffd_line_text(line, " (");
		uffd_line_number(line, others, 10);
		uffd_line_text(line, others > 1 ? " more threads wait)"
						      : " more thread waits)");
	}
}

void uffd_words_put(struct uffd_line *line, const struct uffd_watched *watched,
		    const struct uffd_waiter *waiter, enum uffd_search search,
		    const struct uffd_words_wait *wait)
{
	int32_t pid = watched->owner_pid;

	uffd_line_text(line, "pyuffd: ");
	put_thread(line, pid, waiter->thread_id);
	put_seconds(line, wait->seconds);
	if (waiter->is_event) {
		uffd_line_text(line, " in ");
		put_call(line, pid, waiter->thread_id);
		uffd_line_text(line, " for its event to be read");
	} else {
		uffd_line_text(line, " for ");
		if (search == UFFD_SEARCH_FOUND) {
			put_page(line, pid, waiter->low);
		} else {
			uffd_line_text(line, waiter->high ? "a page in [" : "a page of [");
			uffd_line_number(line, waiter->high ? waiter->low : watched->low, 16);
			uffd_line_text(line, ", ");
			uffd_line_number(line, waiter->high ? waiter->high : watched->high, 16);
			uffd_line_text(line, ")");
		}
	}
	put_advice(line, watched, wait);
	put_others(line, wait->others);
}
