/* SPDX-License-Identifier: MIT */
/*
 * The signal frame by which a thread whose registers were changed restores itself.
 *
 * The process that injects system calls can be killed at any moment; the kernel then lets the
 * thread run with the registers that it has.  So they always lead it back, its "way home": the
 * instruction after the injected system call is a `ret`, which pops the address of the wrapper of
 * rt_sigreturn(2) from a frame with the thread's own state, as after a signal handler.
 */
#ifndef UFFD_REMOTE_FRAME_H
#define UFFD_REMOTE_FRAME_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/user.h>

/* Address, ucontext and extended state fit; AVX-512 needs 2.7 KiB. */
#define UFFD_FRAME_MOST 8192u

/*
 * Write a frame for an address in the target.  `restorer`: "mov $15, %eax; syscall" there.
 * `xstate`: as the kernel returned it, or NULL for a thread without a state worth keeping.
 * length_ret: bytes of the frame; sp_ret: the stack pointer before the `ret`.
 */
int uffd_frame_write(void *buffer, uint64_t address, uint64_t restorer,
		     const struct user_regs_struct *regs, uint64_t mask, const void *xstate,
		     uint64_t xstate_length, uint64_t *length_ret, uint64_t *sp_ret);

/*
 * Ask the CPU what the frame's size depends on, once in a process.  In a virtual machine that needs
 * tens of microseconds: call this before a thread is stopped.
 */
void uffd_frame_learn(void);

/* Whether the kernel would restart a system call if the thread went on with these registers. */
bool uffd_frame_restarts(const struct user_regs_struct *regs);

/*
 * Change the registers of a stopped thread to those with which it continues.  As in the kernel,
 * its system call is restarted; one that waited with a time limit returns EINTR.
 */
void uffd_frame_resume_at(struct user_regs_struct *regs);

#endif /* UFFD_REMOTE_FRAME_H */
