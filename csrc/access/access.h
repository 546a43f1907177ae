/* SPDX-License-Identifier: MIT */
/*
 * Access memory of this process by address; cffi releases the GIL around each call.
 *
 * A page of a registered range may be missing, so each of these can block until the
 * fault is resolved.  An access that raises SIGBUS, on a poisoned page or a truncated
 * file, ends there.
 */
#ifndef UFFD_ACCESS_H
#define UFFD_ACCESS_H

#include <stdint.h>

/* Return 0, or the address whose access raised SIGBUS; a part may be done by then. */
uint64_t uffd_shim_read_memory(void *dst, uint64_t src, uint64_t length);
uint64_t uffd_shim_write_memory(uint64_t dst, const void *src, uint64_t length);
uint64_t uffd_shim_fill_memory(uint64_t dst, int value, uint64_t length);
uint64_t uffd_shim_touch_read(uint64_t start, uint64_t length, uint64_t step);
uint64_t uffd_shim_touch_write(uint64_t start, uint64_t length, uint64_t step);
/* From now on SIGBUS is not caught here, as with any other access of this process. */
void uffd_shim_unguard(void);

#endif /* UFFD_ACCESS_H */
