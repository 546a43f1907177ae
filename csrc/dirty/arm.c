// SPDX-License-Identifier: MIT
#include "dirty/arm.h"
#include "uffd_shim.h"

uint64_t uffd_arm_run(const struct uffd_tracked *at, uint64_t count)
{
	uint64_t i = 1;

	while (i < count && i < UFFD_ARM_AT_ONCE && at[i].start == at[i - 1].end &&
	       at[i].uffd == at->uffd)
		i++;
	return i;
}

static int register_run(const struct uffd_tracked *at, uint64_t count)
{
	uint64_t ioctls;

	return uffd_shim_register((int)at->uffd, at->start, at[count - 1].end - at->start,
				  UFFDIO_REGISTER_MODE_WP, &ioctls);
}

/* By one ioctl; one by one if that fails, so that each gets its own error. */
static void of_run(struct uffd_tracked *at, uint64_t count,
		   int (*ioctl_of)(const struct uffd_tracked *at, uint64_t count))
{
	int ret = ioctl_of(at, count);

	for (uint64_t k = 0; k < count; k++)
		at[k].error = (uint64_t)-(ret && count > 1 ? ioctl_of(&at[k], 1) : ret);
}

void uffd_arm_register(struct uffd_tracked *tracked, uint64_t count)
{
	for (uint64_t i = 0, run; i < count; i += run) {
		run = uffd_arm_run(&tracked[i], count - i);
		of_run(&tracked[i], run, register_run);
	}
}

/* Like uffd_arm_run(), of those that are to be protected, whichever userfaultfd they have. */
static uint64_t protected_run_of(const struct uffd_tracked *at, uint64_t count)
{
	uint64_t i = 0;

	while (i < count && i < UFFD_ARM_AT_ONCE && !at[i].error && at[i].track != UFFD_TRACK_SPARSE &&
	       (!i || at[i].start == at[i - 1].end))
		i++;
	return i;
}

int uffd_arm_protect(int uffd, const struct uffd_tracked *tracked, uint64_t count)
{
	int error = 0;

	for (uint64_t i = 0, run; i < count; i += run ? run : 1) {
		const struct uffd_tracked *at = &tracked[i];
		struct uffd_page_region span = { .start = at->start };
		int ret;

		run = protected_run_of(at, count - i);
		if (!run)
			continue;
		span.end = at[run - 1].end;
		ret = uffd_round_protect(uffd, &span, 1);
		/* A part of it has been unmapped since, or is registered no longer. */
		for (uint64_t k = 0; ret && run > 1 && k < run; k++) {
			span = (struct uffd_page_region){ .start = at[k].start, .end = at[k].end };
			uffd_round_protect(uffd, &span, 1);
		}
		if (!error)
			error = ret;
	}
	return error;
}

static int unregister_run(const struct uffd_tracked *at, uint64_t count)
{
	return uffd_shim_unregister((int)at->uffd, at->start, at[count - 1].end - at->start);
}

void uffd_arm_unregister(struct uffd_tracked *tracked, uint64_t count)
{
	for (uint64_t i = 0, run; i < count; i += run) {
		run = uffd_arm_run(&tracked[i], count - i);
		of_run(&tracked[i], run, unregister_run);
	}
}
