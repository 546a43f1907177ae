/* SPDX-License-Identifier: MIT */
/* The native driver: one C thread. */
#ifndef UFFD_ENGINE_NATIVE_H
#define UFFD_ENGINE_NATIVE_H

#include "core.h"

int uffd_native_start(struct uffd_engine *engine, const int32_t *cpus, uint32_t cpu_count,
		      const char **call_ret);

/* End the thread of an engine without ranges: another engine continues with its userfaultfds. */
void uffd_native_stop(struct uffd_engine *engine);

void native_close(struct uffd_engine *engine);
/* Tell the leader, and threads that could become it, to leave. */
void native_end(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_NATIVE_H */
