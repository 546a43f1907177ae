/* SPDX-License-Identifier: MIT */
/* The loop of whoever leads. */
#ifndef UFFD_ENGINE_LOOP_H
#define UFFD_ENGINE_LOOP_H

#include "core.h"

/* Run the loop until there is a request (a worker), or a worker wants to lead, or stop. */
void run_loop(struct uffd_engine *engine, enum leader role);

uint32_t uffd_engine_owner_exited(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_LOOP_H */
