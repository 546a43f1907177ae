/* SPDX-License-Identifier: MIT */
/* Time, and pauses between retries.  Async-signal-safe. */
#ifndef UFFD_ENGINE_CLOCK_H
#define UFFD_ENGINE_CLOCK_H

#include <stdint.h>

/* CLOCK_MONOTONIC. */
uint64_t uffd_now_ns(void);

/* Pause before a retry: yield at first, since what we wait for may need this CPU. */
void uffd_back_off(unsigned int attempt);

#endif /* UFFD_ENGINE_CLOCK_H */
