// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "remote/device.h"
#include "uffd_abi.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif

static int64_t call(struct uffd_inject *calls, uint64_t sp, long number, uint64_t a, uint64_t b,
		    uint64_t c, uint64_t d)
{
	return uffd_inject_call(calls, calls->child, sp, number, a, b, c, d, 0);
}

/* Arguments of recvmsg(2), in the helper's page and here alike. */
struct message {
	struct msghdr header;
	struct iovec vec;
	char control[CMSG_SPACE(sizeof(int))];
	char byte;
	int pair[2];
};

static int send_device(int socket, int device)
{
	struct message message = { 0 };
	struct cmsghdr *control;

	message.byte = 1;
	message.vec = (struct iovec){ &message.byte, 1 };
	message.header = (struct msghdr){ .msg_iov = &message.vec, .msg_iovlen = 1,
					  .msg_control = message.control,
					  .msg_controllen = sizeof(message.control) };
	control = CMSG_FIRSTHDR(&message.header);
	control->cmsg_level = SOL_SOCKET;
	control->cmsg_type = SCM_RIGHTS;
	control->cmsg_len = CMSG_LEN(sizeof(device));
	memcpy(CMSG_DATA(control), &device, sizeof(device));
	return sendmsg(socket, &message.header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

int64_t uffd_device_open(struct uffd_inject *calls, uint64_t sp, uint64_t at, int pidfd, int device,
			 uint64_t flags)
{
	pid_t helper = calls->child;
	struct message theirs = {
		.header = {
			.msg_iov = (void *)(uintptr_t)(at + offsetof(struct message, vec)),
			.msg_iovlen = 1,
			.msg_control = (void *)(uintptr_t)(at + offsetof(struct message, control)),
			.msg_controllen = sizeof(theirs.control),
		},
		.vec = { (void *)(uintptr_t)(at + offsetof(struct message, byte)), 1 },
	};
	int32_t ours = -1;
	int theirs_device;
	int64_t ret = uffd_inject_put(helper, at, &theirs, sizeof(theirs));

	if (!ret)
		ret = call(calls, sp, SYS_socketpair, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0,
			   at + offsetof(struct message, pair));
	if (!ret)
		ret = uffd_inject_get(helper, at, &theirs, sizeof(theirs));
	if (!ret)
		ret = uffd_inject_fetch(pidfd, theirs.pair[0], &ours);
	if (!ret)
		ret = send_device(ours, device);
	if (!ret)
		ret = call(calls, sp, SYS_recvmsg, (uint64_t)theirs.pair[1], at,
			   MSG_DONTWAIT | MSG_CMSG_CLOEXEC, 0);
	if (ours >= 0)
		close(ours);
	if (ret < 0)
		return ret;
	ret = uffd_inject_get(helper, at, &theirs, sizeof(theirs));
	if (ret)
		return ret;
	if (!theirs.header.msg_controllen)
		return -EMFILE;
	/* The limit may leave no room for a fourth one; the table was empty, so these are neighbors. */
	ret = call(calls, sp, SYS_close_range, (uint64_t)theirs.pair[0], (uint64_t)theirs.pair[1], 0,
			  0);
	if (ret)
		return ret;
	memcpy(&theirs_device, theirs.control + CMSG_LEN(0), sizeof(theirs_device));
	return call(calls, sp, SYS_ioctl, (uint64_t)theirs_device, USERFAULTFD_IOC_NEW, flags, 0);
}
