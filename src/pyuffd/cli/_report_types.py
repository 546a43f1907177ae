"""What `pyuffd doctor` finds: dataclasses whose fields are the keys of its JSON (layer L6).

docs/doctor.md describes every key; a change of their names or meaning needs a new SCHEMA.  Sizes
are bytes, masks are hexadecimal strings (bit 63 does not fit in a JSON reader's double), and None
stands for "no limit" or "this kernel does not say".
"""

from __future__ import annotations

from dataclasses import dataclass

from pyuffd.cli import _cgroup

SCHEMA = 1


@dataclass(frozen=True)
class Mask:
    """Flag bits as a number and by name."""

    mask: str
    names: list[str]


@dataclass(frozen=True)
class Features:
    """The features, by whether this process may use them; `unknown` is a mask."""

    mask: str
    supported: list[str]
    missing: list[str]
    refused: list[str]
    unknown: str


@dataclass(frozen=True)
class Way:
    """One way to open a userfaultfd."""

    works: bool
    errno: str | None
    reason: str | None
    command: str | None


@dataclass(frozen=True)
class Mode:
    """The result of registering one memory type in one mode."""

    works: bool
    errno: str | None
    mask: str
    ioctls: list[str]


@dataclass(frozen=True)
class Kernel:
    """The running kernel."""

    release: str
    machine: str


@dataclass(frozen=True)
class User:
    """The process that ran `pyuffd doctor`."""

    uid: int
    capabilities: list[str]
    seccomp_filter: bool
    user_namespace: bool


@dataclass(frozen=True)
class Memory:
    """Main memory, in bytes."""

    total: int
    available: int


@dataclass(frozen=True)
class Swap:
    """Swap space, in bytes."""

    total: int
    free: int


@dataclass(frozen=True)
class HugePages:
    """The pool of one huge page size; `reserved` pages are free, but reserved by mappings."""

    size: int
    total: int
    free: int
    reserved: int
    surplus: int


@dataclass(frozen=True)
class Shm:
    """/dev/shm, which holds POSIX shared memory, in bytes; None if it does not exist."""

    total: int | None
    free: int | None


@dataclass(frozen=True)
class Thp:
    """Transparent huge pages."""

    enabled: str | None
    shmem_enabled: str | None


@dataclass(frozen=True)
class Limits:
    """Limits of this process, and the kernel's settings."""

    max_map_count: int | None
    memlock_soft: int | None
    memlock_hard: int | None
    nofile_soft: int | None
    nofile_hard: int | None
    nr_hugepages: int | None
    overcommit_memory: int | None
    unprivileged_userfaultfd: int | None


@dataclass(frozen=True)
class Cpus:
    """Processors of the machine, and those this process may run on."""

    online: int
    usable: int


@dataclass(frozen=True)
class Python:
    """The interpreter; `gil` tells whether the GIL is enabled now."""

    implementation: str
    version: str
    free_threaded_build: bool
    gil: bool


@dataclass(frozen=True)
class Missing:
    """Something that is missing, and the command by which root provides it."""

    what: str
    why: str
    command: str | None


@dataclass(frozen=True)
class Report:
    """The whole report of `pyuffd doctor`."""

    schema: int
    pyuffd: str
    usable: bool
    kernel_faults: bool
    kernel: Kernel
    user: User
    open: dict[str, Way]
    features: Features
    ioctls: Mask
    memory_types: dict[str, dict[str, Mode]]
    pagemap_scan: Mask
    memory: Memory
    swap: Swap
    huge_pages: list[HugePages]
    hugetlbfs: list[str]
    shm: Shm
    thp: Thp
    limits: Limits
    cgroup: _cgroup.Limits
    cpus: Cpus
    python: Python
    missing: list[Missing]
