"""What the suite does not check, and why not; for docs/generated/conformance.md."""

from __future__ import annotations

LEFT_OUT: tuple[tuple[str, str], ...] = (
    (
        "`userfaultfd(2)`, ENFILE",
        "The limit `fs.file-max` is that of the whole machine: when it is reached, open(2) fails in"
        " every program. It does not apply to a process with CAP_SYS_ADMIN.",
    ),
    (
        "`userfaultfd(2)`, ENOMEM; a fork with EVENT_FORK, ENOMEM",
        "The kernel's object for a descriptor is charged to no control group, so allocating it"
        " fails only if the whole machine is out of memory. Checking it needs CONFIG_FAILSLAB.",
    ),
    (
        "`UFFDIO_COPY`, `ZEROPAGE`, ENOSPC",
        "Linux 4.11 and 4.12 returned it if the owner had ended. Newer kernels return ESRCH, and"
        " no kernel before 4.13 can run this suite. A full file system gives ENOMEM.",
    ),
    (
        "`UFFDIO_MOVE`, EBUSY of a page that is being written back or locked",
        "User space cannot hold a page in that state. Pages that are shared or pinned are checked.",
    ),
    (
        "`UFFDIO_CONTINUE`, `POISON`, ENOMEM on hugetlb for lack of a page table",
        "They allocate it as COPY does, which is checked. So is a file system out of huge pages.",
    ),
    (
        "`UFFDIO_CONTINUE` of a page with a memory error",
        "It needs CONFIG_MEMORY_FAILURE, and the page of memory that is declared broken is lost"
        " until the next boot.",
    ),
    (
        "Migration by move_pages(2)",
        "Within one NUMA node it moves nothing. The suite uses compaction instead, which does not"
        " move hugetlb pages.",
    ),
    (
        "Huge pages of 1 GiB",
        "`uffd-wp-mremap` tests them if the machine has them. Two of them take 2 GiB of memory.",
    ),
    (
        "Memory that moves between control groups (patch 05)",
        "The kernel no longer does that.",
    ),
    (
        "Patches 03, 07, 08, 15, 16, 20",
        "Helpers and headers, invisible to user space.",
    ),
)
