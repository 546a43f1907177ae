// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/page.h"
#include "snapshot/pages.h"
#include "snapshot/saving.h"

/*
 * Pages that are saved with one that is about to be written: its neighbours are often written next,
 * and copying 64 KiB lasts less long than a second fault.
 */
#define AROUND 16u

_Static_assert(UFFD_RING_DATA == UFFD_OWED_DATA && UFFD_RING_ZERO == UFFD_OWED_ZERO, "states");

enum result {
	SAVED,
	UNREADABLE,
	UNPROTECTED,	/* dropped or moved: perhaps its message is unread */
	ENDED,
};

static enum result save(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address,
			uint64_t pages)
{
	uint64_t until = uffd_now_ns() + saving->max_stall_ns, good = 0;
	bool is_read;
	void *memory;

	saving->error = uffd_ring_reserve(saving->ring, pages, until, &memory);
	if (saving->error)
		return ENDED;
	is_read = !uffd_pages_read(saving->pid, saving->mem_fd, address, pages, memory);
	saving->error = uffd_pages_protected(saving->pagemap_fd, address, pages, &good);
	if (saving->error)
		return ENDED;
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

static uint64_t save_each(struct uffd_saving *saving, struct uffd_owed_piece *piece,
			  uint64_t address, uint64_t pages)
{
	uint64_t saved = 0;

	for (uint64_t i = 0; i < pages; i++) {
		uint64_t at = address + i * BASE_PAGE;
		enum result result = save(saving, piece, at, 1);

		if (result == ENDED)
			break;
		saved += result == SAVED;
		if (result == UNREADABLE)
			uffd_owed_settle(&saving->owed, piece, at, UFFD_OWED_UNREADABLE);
		else if (result == UNPROTECTED)
			uffd_owed_settle(&saving->owed, piece, at, UFFD_OWED_DROPPED);
	}
	return saved;
}

bool uffd_saving_has_room(struct uffd_saving *saving)
{
	return uffd_ring_room(saving->ring) >= saving->memory_pages / 2;
}

bool uffd_saving_all(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address,
		     uint64_t pages)
{
	bool is_saved = save(saving, piece, address, pages) == SAVED;

	if (is_saved)
		saving->swept += pages;
	return is_saved;
}

void uffd_saving_each(struct uffd_saving *saving, struct uffd_owed_piece *piece, uint64_t address,
		      uint64_t pages)
{
	saving->swept += save_each(saving, piece, address, pages);
}

void uffd_saving_before_drop(struct uffd_saving *saving, uint64_t start, uint64_t finish)
{
	struct uffd_owed_piece *piece;
	uint64_t address = start, pages;

	while (!saving->error && (pages = uffd_owed_next(&saving->owed, address, finish,
							 UFFD_PAGES_MOST, &piece, &address))) {
		if (!uffd_saving_all(saving, piece, address, pages) && !saving->error)
			uffd_saving_each(saving, piece, address, pages);
		address += pages * BASE_PAGE;
	}
}

uint64_t uffd_saving_around(struct uffd_saving *saving, uint64_t *address)
{
	/* While the disk is behind, a thread waits for its own page only. */
	uint64_t most = uffd_saving_has_room(saving) ? AROUND : 1, at = *address;
	struct uffd_owed_piece *piece;
	uint64_t pages = uffd_owed_around(&saving->owed, at, most, &piece, &at);

	if (pages > 1 && save(saving, piece, at, pages) == SAVED) {
		saving->faults++;
		saving->swept += pages - 1;
		*address = at;
		return pages;
	}
	if (pages && !saving->error)
		saving->faults += save_each(saving, piece, *address, 1);
	return 1;
}
