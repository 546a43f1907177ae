/* SPDX-License-Identifier: MIT */
/*
 * Memory whose handler is stopped because the interpreter exits: threads that outlive the
 * interpreter may still touch it, and a SIGBUS by itself explains nothing.
 */
#ifndef UFFD_ENDED_H
#define UFFD_ENDED_H

#include <stdint.h>

/* From now on a SIGBUS in this range writes one line to `fd`; the first one of the process. */
int uffd_shim_note_ended(uint64_t start, uint64_t length, int fd);

#endif /* UFFD_ENDED_H */
