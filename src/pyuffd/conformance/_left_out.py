"""What the suite does not check, and why not; for docs/generated/conformance.md."""

from __future__ import annotations

LEFT_OUT: tuple[tuple[str, str], ...] = (
    (
        "`userfaultfd(2)`, ENFILE",
        "The limit `fs.file-max` is the whole machine's: at it, every program's open(2) fails. It"
        " does not hold for a process with CAP_SYS_ADMIN either.",
    ),
    (
        "`userfaultfd(2)`, ENOMEM; a fork with EVENT_FORK, ENOMEM",
        "The kernel's own object for a descriptor is charged to no control group, so only a"
        " machine without any memory has none. Checking it needs CONFIG_FAILSLAB.",
    ),
    (
        "`UFFDIO_COPY`, `ZEROPAGE`, ENOSPC",
        "Linux 4.11 and 4.12 said so of an owner that had ended; ESRCH has been the word since,"
        " and no kernel before 4.13 can run this suite. A full file system is ENOMEM.",
    ),
    (
        "`UFFDIO_MOVE`, EBUSY of a page that is being written back or locked",
        "User space cannot hold a page in that state. Pages that are shared or pinned are checked.",
    ),
    (
        "`UFFDIO_CONTINUE`, `POISON`, ENOMEM on hugetlb for lack of a page table",
        "They make it as COPY does, which is checked. A file system without huge pages is, too.",
    ),
    (
        "`UFFDIO_CONTINUE` of a page with a memory error",
        "It needs CONFIG_MEMORY_FAILURE, and the page of memory that is declared broken is lost"
        " until the next boot.",
    ),
    (
        "Migration by move_pages(2)",
        "Within one NUMA node it moves nothing. Compaction moves pages here, but none of hugetlb"
        " memory.",
    ),
    (
        "Huge pages of 1 GiB",
        "`uffd-wp-mremap` has them where the machine does. Two of them take 2 GiB of memory.",
    ),
    (
        "Memory that moves between control groups (patch 05)",
        "The kernel no longer does that; there is nothing to see.",
    ),
    (
        "Patches 03, 07, 08, 15, 16, 20",
        "Helpers and headers: user space sees nothing of them.",
    ),
)
