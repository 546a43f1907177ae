/* SPDX-License-Identifier: MIT */
/*
 * The fault engine: decides what to do about a fault, without Python.
 *
 * step.c drains the descriptors, applies the layout events it read and resolves the
 * faults.  One thread at a time is the leader and calls it: the engine's own (native.c),
 * or a worker that waits for the next page to fetch (request.c).  inline.c uses no
 * messages: a SIGBUS handler resolves the fault in the faulting thread.
 */
#ifndef UFFD_ENGINE_ENGINE_H
#define UFFD_ENGINE_ENGINE_H

#include "core.h"

/* `call_ret`: the system call that failed, if one did. */
int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret,
		       const char **call_ret);
void uffd_engine_destroy(struct uffd_engine *engine);
/* Destroy *engine if it is deserted, and clear it; returns whether it is NULL now. */
int uffd_engine_discard(struct uffd_engine **engine);

#endif /* UFFD_ENGINE_ENGINE_H */
