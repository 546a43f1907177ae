/* SPDX-License-Identifier: MIT */
/*
 * The fault engine: what to do about a fault, without Python.
 *
 * step.c drains the descriptors, applies the layout events it read and resolves the
 * faults; drivers decide who calls it.  One thread at a time leads: the engine's own
 * (native.c), or a worker that asks for the next page to fetch (request.c).  inline.c
 * does without messages: a SIGBUS handler resolves the fault in the faulting thread.
 */
#ifndef UFFD_ENGINE_ENGINE_H
#define UFFD_ENGINE_ENGINE_H

#include "core.h"

/* `call_ret` is the system call that failed, if one did. */
int uffd_engine_create(const struct uffd_engine_options *options, struct uffd_engine **ret,
		       const char **call_ret);
void uffd_engine_destroy(struct uffd_engine *engine);
/* Destroy the engine at this place, if there is one and it is deserted; whether none is left. */
int uffd_engine_discard(struct uffd_engine **engine);

#endif /* UFFD_ENGINE_ENGINE_H */
