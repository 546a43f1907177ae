/* SPDX-License-Identifier: MIT */
/*
 * The userfaultfd ABI, up to Linux 7.3.
 *
 * The numbers are copied here because the headers a machine builds with are
 * older (or newer) than the kernel it runs: Debian 12's stop at Linux 6.1 and
 * have neither POISON nor MOVE.  Names are the kernel's, so that every line can
 * be compared with userfaultfd(2) and ioctl_userfaultfd(2); never include
 * <linux/userfaultfd.h> next to this file.
 */
#ifndef UFFD_ABI_H
#define UFFD_ABI_H

#include <stdint.h>
#include <sys/ioctl.h>

#ifndef __NR_userfaultfd
#define __NR_userfaultfd 323
#endif

/* Flags of userfaultfd(2), besides O_CLOEXEC and O_NONBLOCK. */
#define UFFD_USER_MODE_ONLY			1

/* /dev/userfaultfd (Linux 6.1). */
#define USERFAULTFD_IOC_NEW			_IO(0xAA, 0x00)

#define UFFD_API				UINT64_C(0xAA)

#define UFFD_FEATURE_PAGEFAULT_FLAG_WP		(UINT64_C(1) << 0)
#define UFFD_FEATURE_EVENT_FORK			(UINT64_C(1) << 1)
#define UFFD_FEATURE_EVENT_REMAP		(UINT64_C(1) << 2)
#define UFFD_FEATURE_EVENT_REMOVE		(UINT64_C(1) << 3)
#define UFFD_FEATURE_MISSING_HUGETLBFS		(UINT64_C(1) << 4)
#define UFFD_FEATURE_MISSING_SHMEM		(UINT64_C(1) << 5)
#define UFFD_FEATURE_EVENT_UNMAP		(UINT64_C(1) << 6)
#define UFFD_FEATURE_SIGBUS			(UINT64_C(1) << 7)
#define UFFD_FEATURE_THREAD_ID			(UINT64_C(1) << 8)
#define UFFD_FEATURE_MINOR_HUGETLBFS		(UINT64_C(1) << 9)
#define UFFD_FEATURE_MINOR_SHMEM		(UINT64_C(1) << 10)
#define UFFD_FEATURE_EXACT_ADDRESS		(UINT64_C(1) << 11)
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM		(UINT64_C(1) << 12)
#define UFFD_FEATURE_WP_UNPOPULATED		(UINT64_C(1) << 13)
#define UFFD_FEATURE_POISON			(UINT64_C(1) << 14)
#define UFFD_FEATURE_WP_ASYNC			(UINT64_C(1) << 15)
#define UFFD_FEATURE_MOVE			(UINT64_C(1) << 16)
#define UFFD_FEATURE_RWP			(UINT64_C(1) << 17)
#define UFFD_FEATURE_RWP_ASYNC			(UINT64_C(1) << 18)

#define UFFDIO_REGISTER_MODE_MISSING		(UINT64_C(1) << 0)
#define UFFDIO_REGISTER_MODE_WP			(UINT64_C(1) << 1)
#define UFFDIO_REGISTER_MODE_MINOR		(UINT64_C(1) << 2)
#define UFFDIO_REGISTER_MODE_RWP		(UINT64_C(1) << 3)

#define UFFDIO_COPY_MODE_DONTWAKE		(UINT64_C(1) << 0)
#define UFFDIO_COPY_MODE_WP			(UINT64_C(1) << 1)
#define UFFDIO_ZEROPAGE_MODE_DONTWAKE		(UINT64_C(1) << 0)
#define UFFDIO_WRITEPROTECT_MODE_WP		(UINT64_C(1) << 0)
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE	(UINT64_C(1) << 1)
#define UFFDIO_CONTINUE_MODE_DONTWAKE		(UINT64_C(1) << 0)
#define UFFDIO_CONTINUE_MODE_WP			(UINT64_C(1) << 1)
#define UFFDIO_POISON_MODE_DONTWAKE		(UINT64_C(1) << 0)
#define UFFDIO_MOVE_MODE_DONTWAKE		(UINT64_C(1) << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES	(UINT64_C(1) << 1)
#define UFFDIO_RWPROTECT_MODE_RWP		(UINT64_C(1) << 0)
#define UFFDIO_RWPROTECT_MODE_DONTWAKE		(UINT64_C(1) << 1)

/* Bit numbers in the ioctls masks of UFFDIO_API and UFFDIO_REGISTER. */
#define _UFFDIO_REGISTER			0x00
#define _UFFDIO_UNREGISTER			0x01
#define _UFFDIO_WAKE				0x02
#define _UFFDIO_COPY				0x03
#define _UFFDIO_ZEROPAGE			0x04
#define _UFFDIO_MOVE				0x05
#define _UFFDIO_WRITEPROTECT			0x06
#define _UFFDIO_CONTINUE			0x07
#define _UFFDIO_POISON				0x08
#define _UFFDIO_RWPROTECT			0x09
#define _UFFDIO_SET_MODE			0x0A
#define _UFFDIO_API				0x3F

#define UFFD_EVENT_PAGEFAULT			0x12
#define UFFD_EVENT_FORK				0x13
#define UFFD_EVENT_REMAP			0x14
#define UFFD_EVENT_REMOVE			0x15
#define UFFD_EVENT_UNMAP			0x16

#define UFFD_PAGEFAULT_FLAG_WRITE		(UINT64_C(1) << 0)
#define UFFD_PAGEFAULT_FLAG_WP			(UINT64_C(1) << 1)
#define UFFD_PAGEFAULT_FLAG_MINOR		(UINT64_C(1) << 2)
#define UFFD_PAGEFAULT_FLAG_RWP			(UINT64_C(1) << 3)

struct uffdio_range {
	uint64_t start;
	uint64_t len;
};

struct uffdio_api {
	uint64_t api;
	uint64_t features;
	uint64_t ioctls;
};

struct uffdio_register {
	struct uffdio_range range;
	uint64_t mode;
	uint64_t ioctls;
};

struct uffdio_copy {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t copy;
};

struct uffdio_zeropage {
	struct uffdio_range range;
	uint64_t mode;
	int64_t zeropage;
};

struct uffdio_writeprotect {
	struct uffdio_range range;
	uint64_t mode;
};

struct uffdio_continue {
	struct uffdio_range range;
	uint64_t mode;
	int64_t mapped;
};

struct uffdio_poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};

struct uffdio_move {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t move;
};

struct uffdio_rwprotect {
	struct uffdio_range range;
	uint64_t mode;
};

struct uffdio_set_mode {
	uint64_t enable;
	uint64_t disable;
};

/* What read(2) returns, one event each. */
struct uffd_msg {
	uint8_t event;
	uint8_t reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	union {
		struct {
			uint64_t flags;
			uint64_t address;
			uint32_t ptid;
		} pagefault;
		struct {
			uint32_t ufd;
		} fork;
		struct {
			uint64_t from;
			uint64_t to;
			uint64_t len;
		} remap;
		struct {
			uint64_t start;
			uint64_t end;
		} remove;
		uint64_t reserved[3];
	} arg;
};

/*
 * UNREGISTER and WAKE have the read direction although the kernel reads the struct;
 * changing it would change the number.
 */
#define UFFDIO_API		_IOWR(0xAA, _UFFDIO_API, struct uffdio_api)
#define UFFDIO_REGISTER		_IOWR(0xAA, _UFFDIO_REGISTER, struct uffdio_register)
#define UFFDIO_UNREGISTER	_IOR(0xAA, _UFFDIO_UNREGISTER, struct uffdio_range)
#define UFFDIO_WAKE		_IOR(0xAA, _UFFDIO_WAKE, struct uffdio_range)
#define UFFDIO_COPY		_IOWR(0xAA, _UFFDIO_COPY, struct uffdio_copy)
#define UFFDIO_ZEROPAGE		_IOWR(0xAA, _UFFDIO_ZEROPAGE, struct uffdio_zeropage)
#define UFFDIO_MOVE		_IOWR(0xAA, _UFFDIO_MOVE, struct uffdio_move)
#define UFFDIO_WRITEPROTECT	_IOWR(0xAA, _UFFDIO_WRITEPROTECT, struct uffdio_writeprotect)
#define UFFDIO_CONTINUE		_IOWR(0xAA, _UFFDIO_CONTINUE, struct uffdio_continue)
#define UFFDIO_POISON		_IOWR(0xAA, _UFFDIO_POISON, struct uffdio_poison)
#define UFFDIO_RWPROTECT	_IOWR(0xAA, _UFFDIO_RWPROTECT, struct uffdio_rwprotect)
#define UFFDIO_SET_MODE		_IOW(0xAA, _UFFDIO_SET_MODE, struct uffdio_set_mode)

_Static_assert(sizeof(struct uffdio_range) == 16, "uffdio_range");
_Static_assert(sizeof(struct uffdio_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct uffdio_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy");
_Static_assert(sizeof(struct uffdio_zeropage) == 32, "uffdio_zeropage");
_Static_assert(sizeof(struct uffdio_writeprotect) == 24, "uffdio_writeprotect");
_Static_assert(sizeof(struct uffdio_continue) == 32, "uffdio_continue");
_Static_assert(sizeof(struct uffdio_poison) == 32, "uffdio_poison");
_Static_assert(sizeof(struct uffdio_move) == 40, "uffdio_move");
_Static_assert(sizeof(struct uffdio_rwprotect) == 24, "uffdio_rwprotect");
_Static_assert(sizeof(struct uffdio_set_mode) == 16, "uffdio_set_mode");
_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");

/* pagemap */

/* Entries of /proc/PID/pagemap: one uint64_t per 4 KiB page. */
#define UFFD_PM_PFN_MASK		((UINT64_C(1) << 55) - 1)
#define UFFD_PM_SOFT_DIRTY		(UINT64_C(1) << 55)
#define UFFD_PM_MMAP_EXCLUSIVE		(UINT64_C(1) << 56)
#define UFFD_PM_UFFD_WP			(UINT64_C(1) << 57)
#define UFFD_PM_GUARD_REGION		(UINT64_C(1) << 58)
#define UFFD_PM_FILE			(UINT64_C(1) << 61)
#define UFFD_PM_SWAP			(UINT64_C(1) << 62)
#define UFFD_PM_PRESENT			(UINT64_C(1) << 63)

/* PAGEMAP_SCAN (Linux 6.7) on the same file; prefixed, because <linux/fs.h> may be newer. */
#define UFFD_PAGE_IS_WPALLOWED		(UINT64_C(1) << 0)
#define UFFD_PAGE_IS_WRITTEN		(UINT64_C(1) << 1)
#define UFFD_PAGE_IS_FILE		(UINT64_C(1) << 2)
#define UFFD_PAGE_IS_PRESENT		(UINT64_C(1) << 3)
#define UFFD_PAGE_IS_SWAPPED		(UINT64_C(1) << 4)
#define UFFD_PAGE_IS_PFNZERO		(UINT64_C(1) << 5)
#define UFFD_PAGE_IS_HUGE		(UINT64_C(1) << 6)
#define UFFD_PAGE_IS_SOFT_DIRTY		(UINT64_C(1) << 7)
#define UFFD_PAGE_IS_GUARD		(UINT64_C(1) << 8)
#define UFFD_PAGE_IS_ACCESSED		(UINT64_C(1) << 9)

#define UFFD_PM_SCAN_WP_MATCHING	(UINT64_C(1) << 0)
#define UFFD_PM_SCAN_CHECK_WPASYNC	(UINT64_C(1) << 1)

struct uffd_page_region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};

struct uffd_pm_scan_arg {
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

#define UFFD_PAGEMAP_SCAN	_IOWR('f', 16, struct uffd_pm_scan_arg)

_Static_assert(sizeof(struct uffd_page_region) == 24, "page_region");
_Static_assert(sizeof(struct uffd_pm_scan_arg) == 96, "pm_scan_arg");

/* madvise(2): fault pages in without touching them (Linux 5.14) */
#define UFFD_MADV_POPULATE_READ		22
#define UFFD_MADV_POPULATE_WRITE	23

#endif /* UFFD_ABI_H */
