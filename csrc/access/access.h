/* SPDX-License-Identifier: MIT */
/*
 * Memory of this process by address, with the GIL released by being a C call.
 *
 * A page of a registered range may be missing, so each of these can block until
 * somebody resolves the fault.  An access that meets SIGBUS, as a poisoned page or a
 * file that was truncated raises it, ends there.
 */
#ifndef UFFD_ACCESS_H
#define UFFD_ACCESS_H

#include <stdint.h>

/* They return 0, or the address whose access raised SIGBUS; part of it may be done. */
uint64_t uffd_shim_read_memory(void *dst, uint64_t src, uint64_t length);
uint64_t uffd_shim_write_memory(uint64_t dst, const void *src, uint64_t length);
uint64_t uffd_shim_fill_memory(uint64_t dst, int value, uint64_t length);
uint64_t uffd_shim_touch_read(uint64_t start, uint64_t length, uint64_t step);
uint64_t uffd_shim_touch_write(uint64_t start, uint64_t length, uint64_t step);
/* From now on they die of it, as any other access of this process. */
void uffd_shim_unguard(void);

#endif /* UFFD_ACCESS_H */
