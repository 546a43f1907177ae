/* SPDX-License-Identifier: MIT */
/*
 * The registers of stopped threads, in the formats of the notes of an ELF core.
 */
#ifndef UFFD_REMOTE_REGISTERS_H
#define UFFD_REMOTE_REGISTERS_H

#include <stdint.h>

#include "remote/trace.h"

/* The thread was not stopped: it waits in vfork(2), and only what a system call keeps is known. */
#define UFFD_REGISTERS_PARTIAL	(1u << 0)

struct uffd_registers {
	int32_t tid;
	uint32_t flags;
	/* The signal that has stopped its process; 0: none has. */
	int32_t stop_signal;
	/* Signals that wait for this thread alone, and those that it blocks: bit 0 is signal 1. */
	uint64_t pending;
	uint64_t blocked;
	/* struct user_regs_struct and struct user_fpregs_struct. */
	uint64_t general[27];
	uint8_t floating[512];
	/*
	 * Bytes of `xstates` with the state as XSAVE writes it, uncompacted: on this CPU, and after
	 * uffd_registers_to_standard on Intel's; 0 bytes: none.
	 */
	uint64_t xstate_at;
	uint64_t xstate_length;
};

/* All zero is empty and valid. */
struct uffd_register_sets {
	struct uffd_registers *vec;
	uint64_t count;
	uint64_t capacity;
	uint8_t *xstates;
	uint64_t xstates_length;
	uint64_t xstates_capacity;
};

/*
 * Append the registers of a thread that the caller traces and has stopped.  -ESRCH: it has ended.
 * -ENOEXEC: it does not run 64-bit code.
 */
int uffd_registers_append(struct uffd_register_sets *sets, int32_t tid);

/* The same for a thread that waits in a system call and was not stopped. */
int uffd_registers_append_waiting(struct uffd_register_sets *sets, int32_t tid);

/*
 * Move vector registers to where Intel's CPUs have them.  In a virtual machine, asking the CPU
 * where it has them takes longer than reading a thread's registers, so do not stop threads for it.
 */
int uffd_registers_to_standard(struct uffd_register_sets *sets);

void uffd_registers_free(struct uffd_register_sets *sets);

#endif /* UFFD_REMOTE_REGISTERS_H */
