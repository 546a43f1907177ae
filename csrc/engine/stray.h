/* SPDX-License-Identifier: MIT */
/* Faults in registered memory that is not served.  For the leader. */
#ifndef UFFD_ENGINE_STRAY_H
#define UFFD_ENGINE_STRAY_H

#include "core.h"

enum outcome note_stray(const struct deferred_fault *fault, bool last_try);
/* Refuse those that have waited too long, or all; returns when the next one will have. */
uint64_t refuse_strays(struct uffd_engine *engine, bool all);

/* Before the end: leave strays to another engine instead of refusing them. */
void uffd_engine_leave_strays(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_STRAY_H */
