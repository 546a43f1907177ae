/* SPDX-License-Identifier: MIT */
/*
 * A served range apart from its address: the source of its pages, and one byte of
 * state for each.  Both outlive a range that is moved or split; a fork's copy shares
 * the content and has separate states.
 */
#ifndef UFFD_CONTENT_H
#define UFFD_CONTENT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "file.h"
#include "overlay.h"

/* What is known about a page, one byte each. */
enum uffd_page_state {
	UFFD_PAGE_ABSENT,
	UFFD_PAGE_IN_FLIGHT,	/* a thread is filling, saving or poisoning it */
	UFFD_PAGE_CLEAN,	/* present; protected if the range is registered for WP */
	UFFD_PAGE_DIRTY,	/* written to since it was protected, or unknown */
	UFFD_PAGE_REMOVED,	/* dropped by its owner: zeros from then on */
	UFFD_PAGE_POISONED,
	UFFD_PAGE_SAVED,	/* preserved in the background, still protected */
	UFFD_PAGE_REQUESTED,	/* waits for a worker's answer; reported as IN_FLIGHT */
	UFFD_PAGE_HELD,		/* in flight but present: being saved, protected, unprotected */
	UFFD_PAGE_EVICTING,	/* in flight: being dropped by us, to be absent */
	UFFD_PAGE_EVICTED,	/* the same, and its REMOVE event has been read */
};

static inline bool uffd_page_is_in_flight(uint8_t state)
{
	return state == UFFD_PAGE_IN_FLIGHT || state >= UFFD_PAGE_REQUESTED;
}

enum uffd_source_kind {
	UFFD_SOURCE_NONE,	/* nothing to fetch: the page cache has the content */
	UFFD_SOURCE_ZERO,
	UFFD_SOURCE_MEMORY,
	UFFD_SOURCE_FILE,
	UFFD_SOURCE_REQUEST,	/* a worker fetches it, see uffd_engine_next_request */
	UFFD_SOURCE_OVERLAY,	/* zeros, memory and files, see overlay.h */
};

/* For messages: describes a range and the source of its pages. */
#define UFFD_LABEL_SIZE 256

struct uffd_range_spec {
	uint64_t start;
	uint64_t length;
	uint64_t page_size;
	uint64_t mode;
	uint32_t source;
	int32_t source_fd;	/* FILE: duplicated by the engine */
	uint64_t source_address; /* MEMORY: borrowed until the range is taken out */
	uint64_t source_offset;	/* FILE */
	uint64_t source_length;	/* in bytes; must reach into the last page */
	struct uffd_overlay_spec overlay; /* covers the whole range; REQUEST: or none */
	uint64_t local;		/* the same memory mapped here, not registered; 0: none */
	uint64_t preserve;	/* where to save old content before the first write; 0: none */
	uint32_t writes_cache;	/* an absent page is filled by writing the source to `local` */
	uint32_t maps_holes;	/* Linux would leave holes unprotected: map them first */
	uint32_t shared;	/* MAP_SHARED: a fork has the same pages, not copies */
	int32_t states_fd;	/* a file for the states, for a successor; borrowed; -1: none */
	uint64_t states_offset;	/* page-aligned */
	char label[UFFD_LABEL_SIZE];
	/* To continue what another engine served; `start` is where this piece is now. */
	uint64_t id;		/* 0: new */
	uint64_t origin;	/* of the piece, in the range as it was served */
	uint64_t piece_length;
	uint32_t is_left;	/* by mremap(2), see left.h */
};

/* Offsets are from the first byte of the range as it was served. */
struct uffd_content {
	_Atomic uint32_t references;
	uint32_t kind;			/* enum uffd_source_kind */
	uint64_t page_size;
	uint64_t length;		/* whole pages that can be read at `address` */
	uint64_t address;		/* of offset 0, in this process */
	/* The last page, if the source ends inside it, and zeros behind that. */
	struct uffd_overlay *tail;
	_Atomic(struct uffd_overlay *) grown;	/* the same, if its file has been written further */
	uint8_t *kept;			/* as it was, if it cannot be read later; else NULL */
	struct uffd_file file;		/* FILE */
	struct uffd_overlay *overlay;	/* OVERLAY or REQUEST, without an `address`; else NULL */
	struct uffd_overlay *outline;	/* where a REQUEST has zeros; NULL: it may have none */
	uint64_t local;
	uint64_t preserve;
	bool writes_cache;
	bool maps_holes;
	bool shared;
	_Atomic bool is_anonymous;	/* found out by a fill: no page cache behind it */
	uint32_t space;			/* number of the space it was served in */
	uint64_t forks;			/* that the engine had followed when it was added */
	_Atomic bool said;		/* a failed page of it was reported, see say.c */
	char label[UFFD_LABEL_SIZE];
};

struct uffd_pages {
	_Atomic uint32_t references;
	struct uffd_pages *clone;	/* while a fork's table is being built */
	uint64_t count;
	uint64_t mapped;		/* bytes of `state` in a file; 0: it is in none */
	uint64_t states_offset;		/* in the file */
	_Atomic uint8_t *state;
	/*
	 * Pages that were written and whose states no longer say so, as they were protected
	 * or evicted since: a bit each, until the next checkpoint.  The thread that has a
	 * page in flight sets its bit.  A fork's copy has none, since only the owner
	 * checkpoints; nor has a successor, since the process driver cannot evict.
	 */
	_Atomic bool has_written;	/* some bit was set */
	_Atomic uint64_t written[];	/* behind them: `state`, if it is in no file */
};

/* -ENODATA: the source ends before the last page. */
int uffd_content_create(const struct uffd_range_spec *spec, struct uffd_content **ret);
struct uffd_content *uffd_content_get(struct uffd_content *content);
void uffd_content_put(struct uffd_content *content);

static inline bool uffd_content_has_tail(const struct uffd_content *content)
{
	return content->tail || content->kept;
}

/* Whether an offset is that of a page in which the source ends. */
static inline bool uffd_content_is_tail(const struct uffd_content *content, uint64_t offset)
{
	return uffd_content_has_tail(content) && offset >= content->length;
}

/* Read the page in which the source ends, as uffd_overlay_read() does. */
int uffd_content_read_tail(const struct uffd_content *content, void *target);

/*
 * The page in which the source ends will be written whole to this file, in which offset 0
 * is at `begin`.  If that is the source's own file, it grows: read the page's end from
 * there then.
 */
int uffd_content_let_grow(struct uffd_content *content, int fd, uint64_t begin);

/*
 * How much of a run the file still has, in whole pages: a truncated file reads as
 * zeros up to the end of its last page, so check before copying.
 */
uint64_t uffd_content_covered(const struct uffd_content *content, uint64_t offset,
			      uint64_t length);

/*
 * The pages from an offset on that are zeros by what the source is, or the pages before
 * the next such ones; returns their length, which may be a part of them.
 */
uint64_t uffd_content_stretch(const struct uffd_content *content, uint64_t offset,
			      uint64_t length, bool *zeros_ret);

/* Whether only a worker can read the page at an offset. */
bool uffd_content_is_requested(const struct uffd_content *content, uint64_t offset);

/* Write the content into memory of this process, without a fault on a truncated file. */
int uffd_content_read(const struct uffd_content *content, void *target, uint64_t offset,
		      uint64_t length);

struct uffd_pages *uffd_pages_create(uint64_t count, uint8_t state);
/*
 * The same in a file.  A page that a dead process had in flight becomes dirty if it was
 * held, else absent; a fill of one that is present after all fails with EEXIST.
 */
struct uffd_pages *uffd_pages_map(int fd, uint64_t offset, uint64_t count);
/* `fd`: a file for the copy, long enough; -1: none. */
struct uffd_pages *uffd_pages_clone(const struct uffd_pages *pages, int fd, uint64_t offset);
uint64_t uffd_pages_file_length(uint64_t count);
struct uffd_pages *uffd_pages_get(struct uffd_pages *pages);

static inline void uffd_pages_note_written(struct uffd_pages *pages, uint64_t index)
{
	atomic_fetch_or(&pages->written[index / 64], UINT64_C(1) << index % 64);
	atomic_store(&pages->has_written, true);
}

/* Remove the note; returns whether there was one. */
static inline bool uffd_pages_take_written(struct uffd_pages *pages, uint64_t index)
{
	uint64_t bit = UINT64_C(1) << index % 64;

	return atomic_load(&pages->has_written) && atomic_load(&pages->written[index / 64]) & bit &&
	       atomic_fetch_and(&pages->written[index / 64], ~bit) & bit;
}

void uffd_pages_put(struct uffd_pages *pages);

#endif /* UFFD_CONTENT_H */
