// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>

#include "base/clock.h"
#include "base/page.h"
#include "snapshot/pages.h"
#include "snapshot/saving.h"
#include "snapshot/unread.h"
#include "uffd_shim.h"

/*
 * Pages that are saved with one that is about to be written: its neighbours are often written next,
 * and copying 64 KiB lasts less long than a second fault.
 */
#define AROUND 16u
/* While it waits for the disk it looks for messages so often in `max_stall_ns`. */
#define LOOKS 8u

_Static_assert(UFFD_RING_DATA == UFFD_OWED_DATA && UFFD_RING_ZERO == UFFD_OWED_ZERO, "states");

enum result {
	SAVED,
	UNREADABLE,
	UNPROTECTED,	/* dropped or moved: perhaps its message is unread */
	CHANGING,	/* its message is unread */
	ENDED,
};

bool uffd_saving_is_changing(const struct uffd_saving *saving)
{
	/* The kernel checks for changes before it checks the range, which is empty. */
	return uffd_shim_writeprotect(saving->uffd, 0, 0, 0) == -EAGAIN;
}

bool uffd_saving_has_unread(struct uffd_saving *saving)
{
	uint64_t now = uffd_now_ns();
	bool has = uffd_unread_any(saving->uffd);

	if (!has)
		saving->unread_ns = now;
	return has;
}

/* Wait for the disk, but let no thread of the process wait for too long. */
static int reserve(struct uffd_saving *saving, uint64_t pages, void **memory_ret)
{
	uint64_t now = uffd_now_ns(), limit = now + saving->max_stall_ns, until;
	int ret;

	do {
		/* Those who wait for this, or else those who wait to be read. */
		uint64_t since = saving->since_ns ? saving->since_ns : saving->unread_ns;

		until = since + saving->max_stall_ns;
		if (until > limit)
			until = limit;
		ret = uffd_ring_reserve(saving->ring, pages,
					until < now + saving->max_stall_ns / LOOKS ?
						until : now + saving->max_stall_ns / LOOKS,
					memory_ret);
		now = uffd_now_ns();
		if (ret == -ETIMEDOUT)
			uffd_saving_has_unread(saving);
	} while (ret == -ETIMEDOUT && now < until);
	return ret;
}

static enum result save(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address,
			uint64_t pages, bool may_change)
{
	uint64_t good = 0;
	bool is_read;
	void *memory;

	saving->error = reserve(saving, pages, &memory);
	if (saving->error)
		return ENDED;
	uffd_cold_note(&saving->cold, address, address + pages * BASE_PAGE);
	is_read = !uffd_pages_read(saving->pid, saving->mem_fd, address, pages, memory);
	uffd_cold_again(&saving->cold);
	saving->error = uffd_pages_protected(saving->pagemap_fd, address, pages, &good);
	if (saving->error)
		return ENDED;
	if (!may_change && uffd_saving_is_changing(saving))
		return CHANGING;
	if (good < pages)
		return UNPROTECTED;
	if (!is_read)
		return UNREADABLE;
	for (uint64_t i = 0; i < pages; i++)
		uffd_owed_settle(&saving->owed, piece, address + i * BASE_PAGE, UFFD_OWED_TAKEN);
	uffd_ring_commit(saving->ring, pages, piece->offset + (address - piece->start),
			 piece->states + (address - piece->start) / BASE_PAGE);
	return SAVED;
}

static enum result save_one(struct uffd_saving *saving, struct uffd_owed_piece *piece,
			    uint64_t address, bool may_change)
{
	enum result result = save(saving, piece, address, 1, may_change);

	if (result == UNREADABLE)
		uffd_owed_settle(&saving->owed, piece, address, UFFD_OWED_UNREADABLE);
	else if (result == UNPROTECTED)
		uffd_owed_settle(&saving->owed, piece, address, UFFD_OWED_DROPPED);
	return result;
}

/* Whether pages may be put in that nobody waits for. */
static bool has_room(struct uffd_saving *saving)
{
	return uffd_ring_room(saving->ring) >= saving->memory_pages / 2;
}

void uffd_saving_one(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address)
{
	saving->swept += save_one(saving, piece, address, false) == SAVED;
}

void uffd_saving_before_drop(struct uffd_saving *saving, uint64_t start, uint64_t finish)
{
	struct uffd_owed_piece *piece;
	uint64_t address = start, pages;

	while (!saving->error && (pages = uffd_owed_next(&saving->owed, address, finish,
							 UFFD_PAGES_MOST, &piece, &address))) {
		bool all = save(saving, piece, address, pages, true) == SAVED;

		for (uint64_t i = 0; !all && i < pages && !saving->error; i++)
			saving->swept +=
				save_one(saving, piece, address + i * BASE_PAGE, true) == SAVED;
		saving->swept += all ? pages : 0;
		address += pages * BASE_PAGE;
	}
}

void uffd_saving_lose(struct uffd_saving *saving, uint64_t start, uint64_t finish)
{
	struct uffd_owed_piece *piece;
	uint64_t address = start, pages;

	while ((pages = uffd_owed_next(&saving->owed, address, finish, UFFD_PAGES_MOST, &piece,
				       &address)))
		for (; pages; pages--, address += BASE_PAGE)
			uffd_owed_settle(&saving->owed, piece, address, UFFD_OWED_DROPPED);
}

/* Whether reading pages would wait for the swap. */
static bool is_on_swap(struct uffd_saving *saving, uint64_t address, uint64_t pages)
{
	bool is;

	uffd_cold_note(&saving->cold, address, address + pages * BASE_PAGE);
	is = saving->cold.count;
	saving->cold.count = 0;
	return is;
}

uint64_t uffd_saving_around(struct uffd_saving *saving, uint64_t *address)
{
	/* While the disk is behind, a thread waits for its own page only. */
	uint64_t most = has_room(saving) ? AROUND : 1, at = *address;
	struct uffd_owed_piece *piece;
	uint64_t pages = uffd_owed_around(&saving->owed, at, most, &piece, &at);
	enum result result;

	if (!pages)
		return 1;
	if (pages > 1 && is_on_swap(saving, at, pages)) {
		at = *address;
		pages = 1;
	}
	result = save(saving, piece, at, pages, false);
	if (result == CHANGING)
		return 0;
	if (result == SAVED) {
		saving->faults++;
		saving->swept += pages - 1;
		*address = at;
		return pages;
	}
	if (result != ENDED)
		result = save_one(saving, piece, *address, false);
	saving->faults += result == SAVED;
	return result != CHANGING;
}
