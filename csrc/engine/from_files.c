// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "file.h"
#include "from_files.h"
#include "range.h"
#include "slices.h"
#include "supply.h"

/* What is read at once, unless a page is larger. */
#define STEP	(1u << 20)

static int read_run(const struct uffd_content_files *files, uint64_t run, uint64_t offset,
		    uint64_t length, char *target)
{
	const struct uffd_run_spec *spec = &files->runs[run];

	if (spec->leaf)
		return uffd_file_read_from(files->fds[spec->leaf - 1], target, length,
					   spec->offset + (offset - spec->start));
	memset(target, 0, length);
	return 0;
}

static int read_runs(const struct uffd_content_files *files, uint64_t offset, uint64_t end,
		     char *target)
{
	uint64_t run = uffd_run_at(files->runs, files->count, offset);
	int r = 0;

	for (; offset < end && r == 0; run++) {
		uint64_t past = run + 1 < files->count ? files->runs[run + 1].start : end;

		past = past < end ? past : end;
		r = read_run(files, run, offset, past - offset, target);
		target += past - offset;
		offset = past;
	}
	return r;
}

static bool are_runs(const struct uffd_content_files *files)
{
	if (!files->count || files->runs[0].start)
		return false;
	for (uint64_t i = 0; i < files->count; i++)
		if (files->runs[i].leaf > files->fds_count ||
		    (i && files->runs[i].start <= files->runs[i - 1].start))
			return false;
	return files->runs[files->count - 1].start < files->length;
}

/* Also finds the longest row. */
static bool are_rows(const struct uffd_page_region *rows, uint64_t count, uint64_t length,
		     uint64_t page_size, uint64_t *longest_ret)
{
	*longest_ret = 0;
	for (uint64_t i = 0; i < count; i++) {
		if (rows[i].start >= rows[i].end || rows[i].end > length ||
		    (rows[i].start | rows[i].end) & (page_size - 1))
			return false;
		if (rows[i].end - rows[i].start > *longest_ret)
			*longest_ret = rows[i].end - rows[i].start;
	}
	return true;
}

static int page_size_of(struct uffd_engine *engine, const struct uffd_range_ref *ref,
			uint64_t *page_size_ret)
{
	struct uffd_range *range;
	struct access access;
	int r = open_piece(engine, ref, &access, &range);

	if (r)
		return r;
	*page_size_ret = range->page_size;
	close_access(&access);
	return 0;
}

/* Errors that stop the whole call; any other concerns these pages alone. */
static bool is_final(int error)
{
	return error == -ESRCH || error == -ECANCELED;
}

static int fill_row(struct uffd_engine *engine, const struct uffd_range_ref *ref,
		    const struct uffd_page_region *row, const struct uffd_content_files *files,
		    char *room, uint64_t step, uint64_t *filled)
{
	int r = 0;

	for (uint64_t at = row->start, past; at < row->end && r == 0; at = past) {
		uint64_t done = 0;

		past = row->end - at < step ? row->end : at + step;
		if (atomic_load(&engine->end.began) && !ends(engine))
			return -ECANCELED;
		r = read_runs(files, at, past, room);
		if (r == 0)
			r = supply_some(engine, ref, at, past - at, room, &done);
		*filled += done;
	}
	return r;
}

int uffd_engine_fill_from_files(struct uffd_engine *engine, const struct uffd_range_ref *ref,
				const struct uffd_page_region *rows, uint64_t count,
				const struct uffd_content_files *files, uint64_t *filled_ret)
{
	uint64_t page_size = 0, step, longest;
	int r = page_size_of(engine, ref, &page_size);
	char *room;

	*filled_ret = 0;
	if (r)
		return r;
	if (!are_runs(files) || !are_rows(rows, count, files->length, page_size, &longest))
		return -EINVAL;
	if (!count)
		return 0;
	step = page_size > STEP ? page_size : STEP;
	step = longest < step ? longest : step;
	room = mmap(NULL, step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
		    -1, 0);
	if (room == MAP_FAILED)
		return -ENOMEM;
	for (uint64_t i = 0; i < count && !is_final(r); i++)
		r = fill_row(engine, ref, &rows[i], files, room, step, filled_ret);
	munmap(room, step);
	return is_final(r) ? r : 0;
}
