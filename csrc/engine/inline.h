/* SPDX-License-Identifier: MIT */
/* The inline driver: a SIGBUS handler for the whole process. */
#ifndef UFFD_ENGINE_INLINE_H
#define UFFD_ENGINE_INLINE_H

#include "core.h"

int uffd_inline_start(struct uffd_engine *engine);
/* `to_original`: the action installed over ours no longer works. */
void uffd_inline_stop(struct uffd_engine *engine, uint32_t to_original);
/* Whether the process's SIGBUS action is ours; install it again. */
int uffd_inline_is_installed(void);
int uffd_inline_reinstall(void);
/* Whether an engine that is started serves the address. */
int uffd_inline_serves(uint64_t address);

extern struct uffd_table uffd_inline_table;

/* A range of an inline engine is about to leave the table: its memory is unregistered. */
void inline_note_taken_out(void);

/* In the child of a fork. */
void inline_forget_parent(void);

#endif /* UFFD_ENGINE_INLINE_H */
