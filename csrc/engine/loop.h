/* SPDX-License-Identifier: MIT */
/* The leader's loop. */
#ifndef UFFD_ENGINE_LOOP_H
#define UFFD_ENGINE_LOOP_H

#include "core.h"

/* Run until stopped, until there is a request (worker), or until a worker can lead (native). */
void run_loop(struct uffd_engine *engine, enum leader role);

uint32_t uffd_engine_owner_exited(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_LOOP_H */
