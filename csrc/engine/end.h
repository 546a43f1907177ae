/* SPDX-License-Identifier: MIT */
/* The end of an engine. */
#ifndef UFFD_ENGINE_END_H
#define UFFD_ENGINE_END_H

#include "core.h"

/*
 * End the engine: the leader stops, every range is sealed and taken out as by unserve.
 * `patience_ns` limits all waits together; time spent working does not count.
 * -EBUSY: ranges stay registered because they could not be sealed.  Threads that a
 * source blocks may be left behind: see uffd_engine_is_deserted.
 */
int uffd_engine_end(struct uffd_engine *engine, uint64_t patience_ns);
/* From any thread: end drain now, and limit all further waits to this. */
void uffd_engine_hurry(struct uffd_engine *engine, uint64_t patience_ns);
/* Changes as long as the end makes progress. */
uint64_t uffd_engine_progress(struct uffd_engine *engine);

/* A thread at pages of a range, perhaps blocked there; its ioctl may still change them. */
struct uffd_held {
	uint64_t id;
	uint64_t start;
	uint64_t length;
	uint32_t thread_id;
	uint32_t is_request;	/* a worker fetches them: no ioctl is under way */
};

uint32_t uffd_engine_held(struct uffd_engine *engine, struct uffd_held *held_ret,
			  uint32_t capacity);
/* After the end: whether no thread is left inside, callers aside. */
int uffd_engine_is_deserted(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_END_H */
