/* SPDX-License-Identifier: MIT */
/*
 * The memory registered in an address space, served or not, as reported by callers.  Memory
 * that is registered but not listed comes from the growth of a mapping.
 */
#ifndef UFFD_ENGINE_REGISTERED_H
#define UFFD_ENGINE_REGISTERED_H

#include "core.h"

/* Async-signal-safe.  Also true if the list is not complete. */
bool is_registered(struct uffd_space *space, uint64_t address);
/* The start of the next listed memory from `address` on, at most `end`. */
uint64_t next_registered(struct uffd_space *space, uint64_t address, uint64_t end);

/*
 * Ask the kernel whether [start, end) of a range's space is one mapping, and registered.
 * -EAGAIN: the layout is changing; -ESRCH: the process has exited.
 */
int is_one_mapping(const struct uffd_range *range, uint64_t start, uint64_t end, bool *one_ret);

/*
 * List memory that is registered, or about to be.  -ENOMEM: not all of it is listed, and
 * from now on no memory counts as grown.
 */
int list_registered(struct uffd_space *space, uint64_t start, uint64_t end);
/* Unlist [start, end), except what would split an entry or cut off its beginning. */
void unlist_registered(struct uffd_space *space, uint64_t start, uint64_t end);

/* With the gate closed: a mapping was moved; a process has forked. */
void move_registered(struct uffd_space *space, uint64_t from, uint64_t to, uint64_t length);
void clone_registered(struct uffd_space *parent, struct uffd_space *child);
void free_registered(struct uffd_space *space);

#endif /* UFFD_ENGINE_REGISTERED_H */
