/* SPDX-License-Identifier: MIT */
/* The end of an engine. */
#ifndef UFFD_ENGINE_END_H
#define UFFD_ENGINE_END_H

#include "core.h"

/*
 * The end: whoever leads leaves, every range is sealed and taken out as by unserve.
 * `patience_ns` is for all waits together; while there is work it does not count.
 * -EBUSY: ranges stay registered because they could not be sealed.  Threads may be
 * left behind that a source holds up: see uffd_engine_is_deserted.
 */
int uffd_engine_end(struct uffd_engine *engine, uint64_t patience_ns);
/* From any thread: end drain now, and wait no longer than this for anything. */
void uffd_engine_hurry(struct uffd_engine *engine, uint64_t patience_ns);
/* Changes as long as the end gets on. */
uint64_t uffd_engine_progress(struct uffd_engine *engine);

/* A thread at pages of a serving, perhaps held up there, and what its ioctl may still change. */
struct uffd_held {
	uint64_t id;
	uint64_t start;
	uint64_t length;
	uint32_t thread_id;
	uint32_t is_request;	/* it fetches them: no ioctl is under way */
};

uint32_t uffd_engine_held(struct uffd_engine *engine, struct uffd_held *held_ret,
			  uint32_t capacity);
/* After the end: whether no thread is inside any more, but for callers. */
int uffd_engine_is_deserted(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_END_H */
