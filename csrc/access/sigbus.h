/* SPDX-License-Identifier: MIT */
/*
 * The SIGBUS action of this process: the inline driver resolves faults in it, and an
 * access of ours that cannot be had comes back with an error instead of dying.  Every
 * other SIGBUS goes to the action that was there before.
 */
#ifndef UFFD_SIGBUS_H
#define UFFD_SIGBUS_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

/* Runs in the signal handler; true: the fault is resolved, and the access is repeated. */
typedef bool (*uffd_sigbus_resolver)(uint64_t address, uint64_t cpu_error);

/* For drivers: from start to stop.  `to_original`: what took our place works no more. */
int uffd_sigbus_acquire(uffd_sigbus_resolver resolver);
void uffd_sigbus_release(bool to_original);

/* Runs in the signal handler when nobody has resolved it; need not return. */
typedef void (*uffd_sigbus_escape)(const siginfo_t *info, const void *context);

/* For single accesses: it is on top; the action stays after the last one. */
void uffd_sigbus_enter(uffd_sigbus_escape escape);
void uffd_sigbus_leave(void);

/* Whether the action of the process is ours; put it back on top if it is not. */
int uffd_sigbus_is_installed(void);
int uffd_sigbus_reinstall(void);

/* A fork's child begins anew. */
void uffd_sigbus_forget_parent(void);

#endif /* UFFD_SIGBUS_H */
