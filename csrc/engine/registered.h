/* SPDX-License-Identifier: MIT */
/*
 * What was registered in an address space, as far as we are told: served or not.  Memory
 * that is registered and not listed came by the growth of a mapping.
 */
#ifndef UFFD_ENGINE_REGISTERED_H
#define UFFD_ENGINE_REGISTERED_H

#include "core.h"

/* Async-signal-safe.  True also where nobody tells us. */
bool is_registered(struct uffd_space *space, uint64_t address);
/* Where the first that is listed begins behind an address, at most `end`. */
uint64_t next_registered(struct uffd_space *space, uint64_t address, uint64_t end);

/*
 * What has been registered, or is about to be.  -ENOMEM: not all of it is listed, and from
 * now on nothing is taken for grown.
 */
int list_registered(struct uffd_space *space, uint64_t start, uint64_t end);
/* What is left in the middle of a longer one stays listed. */
void unlist_registered(struct uffd_space *space, uint64_t start, uint64_t end);

/* Inside the closed gate: a mapping was moved, and a process has forked. */
void move_registered(struct uffd_space *space, uint64_t from, uint64_t to, uint64_t length);
void clone_registered(struct uffd_space *parent, struct uffd_space *child);
void free_registered(struct uffd_space *space);

#endif /* UFFD_ENGINE_REGISTERED_H */
