// SPDX-License-Identifier: MIT
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>

#include "remote/frame.h"

/* struct ucontext and struct sigcontext_64 of the kernel (arch/x86/include/uapi/asm). */
struct frame {
	uint64_t restorer;
	uint64_t uc_flags;
	uint64_t uc_link;
	uint64_t stack_start;
	uint32_t stack_flags;
	uint32_t padding;
	uint64_t stack_size;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
	uint64_t rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags;
	uint16_t cs, gs, fs, ss;
	uint64_t err, trapno, oldmask, cr2;
	uint64_t fpstate;
	uint64_t reserved[8];
	uint64_t mask;
	/* siginfo_t, which rt_sigreturn(2) does not read. */
	uint64_t info[16];
};

_Static_assert(sizeof(struct frame) == 8 + 304 + 128, "rt_sigframe");

#define UC_FP_XSTATE 1u
#define UC_SIGCONTEXT_SS 2u
#define UC_STRICT_RESTORE_SS 4u
/* Neither SS_ONSTACK nor SS_DISABLE: the kernel does not change the alternate stack. */
#define STACK_UNCHANGED 4u

/* The bytes behind the legacy area's registers (struct _fpx_sw_bytes). */
struct sw_bytes {
	uint32_t magic1;
	uint32_t extended_size;
	uint64_t xfeatures;
	uint32_t xstate_size;
	uint32_t padding[7];
};

#define SW_OFFSET 464u
#define LEGACY_SIZE 512u
#define HEADER_SIZE 64u
#define FP_MAGIC1 0x46505853u
#define FP_MAGIC2 0x46505845u
#define XSTATE_ALIGN 64u
/* The kernel grants tile registers and later state on demand; other frames lack it. */
#define FIRST_DYNAMIC 17u

/* Errors inside the kernel that ask for a restart (include/linux/errno.h). */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

/* Where the state of each feature ends in a frame; 0: it is in none. */
static uint32_t feature_ends[FIRST_DYNAMIC];
static pthread_once_t feature_ends_once = PTHREAD_ONCE_INIT;

static void find_feature_ends(void)
{
	for (uint32_t i = 2; i < FIRST_DYNAMIC; i++) {
		uint32_t length = 0, offset = 0, ecx, edx;

		/* ecx bit 0: state of the supervisor, in no frame. */
		if (__get_cpuid_count(0xd, i, &length, &offset, &ecx, &edx) && !(ecx & 1))
			feature_ends[i] = offset + length;
	}
}

void uffd_frame_learn(void)
{
	pthread_once(&feature_ends_once, find_feature_ends);
}

/* The size of a frame's extended state with these features. */
static uint32_t xstate_size(uint64_t features)
{
	uint32_t size = LEGACY_SIZE + HEADER_SIZE;

	uffd_frame_learn();
	for (uint32_t i = 2; i < FIRST_DYNAMIC; i++)
		if (features >> i & 1 && feature_ends[i] > size)
			size = feature_ends[i];
	return size;
}

static int write_xstate(char *to, const void *xstate, uint64_t length, uint64_t room,
			uint64_t *used_ret)
{
	struct sw_bytes sw = { .magic1 = FP_MAGIC1 };
	const uint32_t magic2 = FP_MAGIC2;
	uint64_t features, size;

	if (length < LEGACY_SIZE + HEADER_SIZE)
		return -EINVAL;
	/* XCR0, which the kernel puts there. */
	memcpy(&features, (const char *)xstate + SW_OFFSET, sizeof(features));
	features &= (UINT64_C(1) << FIRST_DYNAMIC) - 1;
	size = xstate_size(features);
	if (size > length || size + sizeof(magic2) > room)
		return -E2BIG;
	memcpy(to, xstate, size);
	sw.xfeatures = features;
	sw.xstate_size = (uint32_t)size;
	sw.extended_size = (uint32_t)(size + sizeof(magic2));
	memcpy(to + SW_OFFSET, &sw, sizeof(sw));
	memcpy(to + size, &magic2, sizeof(magic2));
	*used_ret = size + sizeof(magic2);
	return 0;
}

int uffd_frame_write(void *buffer, uint64_t address, uint64_t restorer,
		     const struct user_regs_struct *regs, uint64_t mask, const void *xstate,
		     uint64_t xstate_length, uint64_t *length_ret, uint64_t *sp_ret)
{
	struct frame frame = {
		.restorer = restorer,
		.uc_flags = UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
		.stack_flags = STACK_UNCHANGED,
		.r8 = regs->r8, .r9 = regs->r9, .r10 = regs->r10, .r11 = regs->r11,
		.r12 = regs->r12, .r13 = regs->r13, .r14 = regs->r14, .r15 = regs->r15,
		.rdi = regs->rdi, .rsi = regs->rsi, .rbp = regs->rbp, .rbx = regs->rbx,
		.rdx = regs->rdx, .rax = regs->rax, .rcx = regs->rcx, .rsp = regs->rsp,
		.rip = regs->rip, .eflags = regs->eflags,
		.cs = (uint16_t)regs->cs, .gs = (uint16_t)regs->gs,
		.fs = (uint16_t)regs->fs, .ss = (uint16_t)regs->ss,
		.mask = mask,
	};
	uint64_t xstate_at = (address + sizeof(frame) + XSTATE_ALIGN - 1) & ~(uint64_t)(XSTATE_ALIGN - 1);
	uint64_t used = 0;

	memset(buffer, 0, UFFD_FRAME_MOST);
	if (xstate) {
		uint64_t offset = xstate_at - address;
		int ret = write_xstate((char *)buffer + offset, xstate, xstate_length,
				       UFFD_FRAME_MOST - offset, &used);

		if (ret)
			return ret;
		used += offset;
		frame.uc_flags |= UC_FP_XSTATE;
		frame.fpstate = xstate_at;
	} else {
		used = sizeof(frame);
	}
	memcpy(buffer, &frame, sizeof(frame));
	*length_ret = used;
	*sp_ret = address;
	return 0;
}

bool uffd_frame_restarts(const struct user_regs_struct *regs)
{
	if ((int64_t)regs->orig_rax < 0)
		return false;
	switch (-(int64_t)regs->rax) {
	case ERESTARTSYS:
	case ERESTARTNOINTR:
	case ERESTARTNOHAND:
	case ERESTART_RESTARTBLOCK:
		return true;
	default:
		return false;
	}
}

void uffd_frame_resume_at(struct user_regs_struct *regs)
{
	if ((int64_t)regs->orig_rax < 0)
		return;
	switch (-(int64_t)regs->rax) {
	case ERESTARTSYS:
	case ERESTARTNOINTR:
	case ERESTARTNOHAND:
		regs->rax = regs->orig_rax;
		regs->rip -= 2;
		break;
	case ERESTART_RESTARTBLOCK:
		regs->rax = (uint64_t)-EINTR;
		break;
	default:
		break;
	}
	regs->orig_rax = (uint64_t)-1;
}
