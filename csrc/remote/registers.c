// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/array.h"
#include "remote/registers.h"

#define SETS_FIRST 64u
/* Room for one thread's extended state; with AMX it has 11 KiB. */
#define XSTATE_MOST (64u << 10)

_Static_assert(sizeof(((struct uffd_registers *)0)->general) == sizeof(struct user_regs_struct),
	       "general registers");
_Static_assert(sizeof(((struct uffd_registers *)0)->floating) == sizeof(struct user_fpregs_struct),
	       "floating point registers");

static int append(struct uffd_register_sets *sets, const struct uffd_registers *registers)
{
	int ret = uffd_array_grow((void **)&sets->vec, &sets->capacity, sets->count + 1,
				  SETS_FIRST, sizeof(*sets->vec));

	if (!ret)
		sets->vec[sets->count++] = *registers;
	return ret;
}

/* Parts of the extended state behind the first 576 bytes, which are the same on all CPUs. */
#define XSTATE_FIXED 576u
#define XSTATE_FEATURES_AT 464u /* the kernel's note of the features that are enabled */
#define XSTATE_CPUID 0xdu

struct component {
	uint32_t number;
	uint32_t offset;
	uint32_t size;
};

/* Where Intel's CPUs have them. */
static const struct component STANDARD[] = {
	{ 2, 576, 256 }, /* AVX */
	{ 3, 960, 64 }, /* MPX: bounds */
	{ 4, 1024, 64 }, /* and their configuration */
	{ 5, 1088, 64 }, /* AVX-512: masks */
	{ 6, 1152, 512 }, /* upper halves */
	{ 7, 1664, 1024 }, /* further registers */
	{ 9, 2688, 8 }, /* PKRU */
};
#define STANDARD_COUNT (sizeof(STANDARD) / sizeof(STANDARD[0]))
#define STANDARD_MOST 2696u

/*
 * Where this CPU has a component; 0: unknown, or its size is another one.
 */
static uint32_t offset_here(const struct component *component)
{
	uint32_t size, offset, c, d;

	if (!__get_cpuid_count(XSTATE_CPUID, component->number, &size, &offset, &c, &d))
		return 0;
	return size == component->size ? offset : 0;
}

/*
 * AMD's CPUs leave no room for components that they lack, so the others are elsewhere.  Debuggers
 * (gdb before 14) know one layout only, and drop all vector registers of a shorter state.  Returns
 * the length of what was moved to `moved`, or 0 if the state is to stay as it is.
 */
static uint64_t to_standard(const uint8_t *xstate, uint64_t length, uint8_t *moved)
{
	uint64_t features, end = XSTATE_FIXED;
	bool differs = false;

	if (length < XSTATE_FIXED || length > STANDARD_MOST)
		return 0;
	memset(moved, 0, STANDARD_MOST);
	memcpy(&features, xstate + XSTATE_FEATURES_AT, sizeof(features));
	memcpy(moved, xstate, XSTATE_FIXED);
	for (size_t i = 0; i < STANDARD_COUNT; i++) {
		const struct component *component = &STANDARD[i];
		uint32_t at;

		if (!(features >> component->number & 1))
			continue;
		features &= ~(1ull << component->number);
		at = offset_here(component);
		if (!at || at + component->size > length)
			return 0;
		memcpy(moved + component->offset, xstate + at, component->size);
		end = component->offset + component->size;
		differs |= at != component->offset;
	}
	/* What is left besides x87 and SSE has an unknown place. */
	return differs && !(features & ~3ull) ? end : 0;
}

int uffd_registers_to_standard(struct uffd_register_sets *sets)
{
	uint8_t *moved = malloc(sets->xstates_length + sets->count * STANDARD_MOST + 1);
	uint64_t end = 0;

	if (!moved)
		return -ENOMEM;
	for (uint64_t i = 0; i < sets->count; i++) {
		struct uffd_registers *registers = &sets->vec[i];
		const uint8_t *xstate = sets->xstates + registers->xstate_at;
		uint64_t length = 0;

		if (registers->xstate_length)
			length = to_standard(xstate, registers->xstate_length, moved + end);
		if (!length) {
			length = registers->xstate_length;
			if (length)
				memcpy(moved + end, xstate, length);
		}
		registers->xstate_at = end;
		registers->xstate_length = length;
		end += length;
	}
	free(sets->xstates);
	sets->xstates = moved;
	sets->xstates_length = end;
	sets->xstates_capacity = end;
	return 0;
}

static int append_xstate(struct uffd_register_sets *sets, struct uffd_registers *registers)
{
	uint64_t at = sets->xstates_length, length = XSTATE_MOST;
	int ret = uffd_array_grow((void **)&sets->xstates, &sets->xstates_capacity, at + length,
				  SETS_FIRST, 1);

	if (ret)
		return ret;
	ret = uffd_trace_get_xstate(registers->tid, sets->xstates + at, &length);
	if (ret)
		return ret == -ESRCH ? ret : 0; /* a CPU without XSAVE has none */
	registers->xstate_at = at;
	registers->xstate_length = length;
	sets->xstates_length += registers->xstate_length;
	return 0;
}

int uffd_registers_append(struct uffd_register_sets *sets, int32_t tid)
{
	struct uffd_registers registers = { .tid = tid };
	int ret = uffd_trace_get_regs(tid, (struct user_regs_struct *)registers.general);

	if (!ret)
		ret = uffd_trace_get_fpregs(tid, (struct user_fpregs_struct *)registers.floating);
	if (!ret)
		ret = uffd_trace_get_mask(tid, &registers.blocked);
	if (!ret)
		ret = uffd_trace_get_signals(tid, &registers.stop_signal, &registers.pending);
	if (!ret)
		ret = append_xstate(sets, &registers);
	return ret ? ret : append(sets, &registers);
}

int uffd_registers_append_waiting(struct uffd_register_sets *sets, int32_t tid)
{
	struct uffd_registers registers = { .tid = tid, .flags = UFFD_REGISTERS_PARTIAL };
	struct user_regs_struct *regs = (struct user_regs_struct *)registers.general;
	unsigned long long number, a, b, c, d, e, f, sp, ip;
	char path[40], text[256];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/syscall", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT ? -ESRCH : -errno;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return -ESRCH;
	text[n] = '\0';
	if (sscanf(text, "%llu %llx %llx %llx %llx %llx %llx %llx %llx", &number, &a, &b, &c, &d,
		   &e, &f, &sp, &ip) != 9)
		return -ESRCH; /* it does not wait in a system call any more */
	regs->orig_rax = number;
	regs->rdi = a;
	regs->rsi = b;
	regs->rdx = c;
	regs->r10 = d;
	regs->r8 = e;
	regs->r9 = f;
	regs->rsp = sp;
	regs->rip = ip;
	regs->rax = (uint64_t)-ENOSYS; /* what the kernel puts there at the entry */
	return append(sets, &registers);
}

void uffd_registers_free(struct uffd_register_sets *sets)
{
	free(sets->vec);
	free(sets->xstates);
	*sets = (struct uffd_register_sets){ 0 };
}
