/* SPDX-License-Identifier: MIT */
/*
 * The SIGBUS action of this process: the inline driver resolves faults in it, and a
 * guarded access that raises SIGBUS returns an error.  Every other SIGBUS goes to the
 * previous action.
 */
#ifndef UFFD_SIGBUS_H
#define UFFD_SIGBUS_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

/* Runs in the signal handler; true: the fault is resolved, so repeat the access. */
typedef bool (*uffd_sigbus_resolver)(uint64_t address, uint64_t cpu_error);

/* For drivers, from start to stop.  `to_original`: an action installed over ours is dead. */
int uffd_sigbus_acquire(uffd_sigbus_resolver resolver);
void uffd_sigbus_release(bool to_original);

/* Runs in the signal handler if the fault was not resolved; need not return. */
typedef void (*uffd_sigbus_escape)(const siginfo_t *info, const void *context);

/* Around a single access: our action is on top; it stays installed after the last one. */
void uffd_sigbus_enter(uffd_sigbus_escape escape);
void uffd_sigbus_leave(void);

/*
 * From now on our action stays installed, and calls this in the signal handler before a
 * SIGBUS goes to the previous action.
 */
typedef void (*uffd_sigbus_explainer)(uint64_t address);
int uffd_sigbus_explain(uffd_sigbus_explainer explainer);

/* Whether the process's SIGBUS action is ours; install it again. */
int uffd_sigbus_is_installed(void);
int uffd_sigbus_reinstall(void);

/* In the child of a fork: no driver and no access uses it. */
void uffd_sigbus_forget_parent(void);

#endif /* UFFD_SIGBUS_H */
