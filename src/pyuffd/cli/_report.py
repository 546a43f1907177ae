"""How `pyuffd doctor` finds what it reports (layer L6)."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shlex
import sys
from collections.abc import Iterator
from enum import IntFlag
from pathlib import Path

import pyuffd
from pyuffd import Feature, KernelSupport
from pyuffd.cli import _cgroup
from pyuffd.cli._report_types import (
    SCHEMA,
    Cpus,
    Features,
    HugePages,
    Kernel,
    Limits,
    Mask,
    Memory,
    Missing,
    Mode,
    Python,
    Report,
    Shm,
    Swap,
    Thp,
    User,
    Way,
)

SYSFS_MM = Path("/sys/kernel/mm")
PROC_VM = Path("/proc/sys/vm")

# The capabilities that change what a user of userfaultfd may do.
CAPABILITIES = {
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
}

# For the advice only: the feature mask says what the kernel has.
FEATURE_SINCE = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",
    Feature.EVENT_FORK: "4.11",
    Feature.EVENT_REMAP: "4.11",
    Feature.EVENT_REMOVE: "4.11",
    Feature.MISSING_HUGETLBFS: "4.11",
    Feature.MISSING_SHMEM: "4.11",
    Feature.EVENT_UNMAP: "4.11",
    Feature.SIGBUS: "4.14",
    Feature.THREAD_ID: "4.14",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19 with CONFIG_PTE_MARKER_UFFD_WP",
    Feature.WP_UNPOPULATED: "6.4 with CONFIG_PTE_MARKER_UFFD_WP",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7 with CONFIG_PTE_MARKER_UFFD_WP",
    Feature.MOVE: "6.8",
    Feature.RWP: "7.3",
    Feature.RWP_ASYNC: "7.3",
}

# What the examples and the demo need, with some to spare: 128 MiB.
ADVISED_HUGE_PAGES = {2 << 20: 64, 1 << 30: 1}
DEFAULT_MAX_MAP_COUNT = 65530


def make_report() -> Report:
    """Ask the kernel and the machine."""
    support = pyuffd.probe()
    memory, swap = _memory_and_swap()
    huge_pages = _huge_pages()
    thp, limits, hugetlbfs = _thp(), _limits(), _hugetlbfs_mounts()
    missing = [
        *_missing_ways(support),
        *_missing_features(support),
        *_missing_memory(swap, huge_pages, hugetlbfs, thp, limits),
    ]
    return Report(
        schema=SCHEMA,
        pyuffd=pyuffd.__version__,
        usable=support.usable,
        kernel_faults=support.kernel_faults,
        kernel=Kernel(support.release, platform.machine()),
        user=_user(),
        open={
            name: Way(way.works, _errno_name(way.errno), way.reason or None, way.command or None)
            for name, way in support.opens.items()
        },
        features=Features(
            mask=hex(support.features),
            supported=_names(support.features),
            missing=_names(_lacking(support)),
            refused=_names(support.refused),
            unknown=hex(support.unknown_features),
        ),
        ioctls=Mask(hex(support.ioctls), _names(support.ioctls)),
        memory_types={
            memory_type: {
                str(mode.name): Mode(
                    not found.errno,
                    _errno_name(found.errno),
                    hex(found.ioctls),
                    _names(found.ioctls),
                )
                for mode, found in modes.items()
            }
            for memory_type, modes in support.memory.items()
        },
        pagemap_scan=Mask(hex(support.scan_categories), _names(support.scan_categories)),
        memory=memory,
        swap=swap,
        huge_pages=huge_pages,
        hugetlbfs=hugetlbfs,
        shm=_shm(),
        thp=thp,
        limits=limits,
        cgroup=_cgroup.limits(),
        cpus=Cpus(os.cpu_count() or 1, len(os.sched_getaffinity(0))),
        python=_python(),
        missing=missing,
    )


def _lacking(support: KernelSupport) -> Feature:
    """Return the known features that this kernel lacks; none if no userfaultfd could be opened."""
    lacking = Feature(0)
    for feature in Feature:
        if support.usable and feature not in support.features:
            lacking |= feature
    return lacking


def _names(mask: IntFlag) -> list[str]:
    """Return the names of the set bits that have one, lowest first."""
    return [str(flag.name) for flag in type(mask) if flag in mask]


def size_text(size: int) -> str:
    """Return a size for people: 2 MiB, 23.5 GiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def _errno_name(code: int) -> str | None:
    return errno.errorcode.get(code, str(code)) if code else None


# The machine


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None else None


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _user() -> User:
    status = _status()
    held = int(status["CapEff"], 16)
    uid_map = (_text(Path("/proc/self/uid_map")) or "0 0 4294967295").split()
    return User(
        uid=os.geteuid(),
        capabilities=[name for name, bit in CAPABILITIES.items() if held >> bit & 1],
        seccomp_filter=status.get("Seccomp") == "2",
        user_namespace=uid_map != ["0", "0", "4294967295"],
    )


def _memory_and_swap() -> tuple[Memory, Swap]:
    found = dict.fromkeys(("MemTotal", "MemAvailable", "SwapTotal", "SwapFree"), 0)
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) << 10
    total, available, swap_total, swap_free = found.values()
    return Memory(total, available), Swap(swap_total, swap_free)


def _huge_pages() -> list[HugePages]:
    pools = []
    for folder in (SYSFS_MM / "hugepages").glob("hugepages-*kB"):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        counts = (
            _number(folder / f"{name}_hugepages") or 0 for name in ("nr", "free", "resv", "surplus")
        )
        pools.append(HugePages(size, *counts))
    return sorted(pools, key=lambda pool: pool.size)


def _hugetlbfs_mounts() -> list[str]:
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [mount[1] for mount in mounts if mount[2] == "hugetlbfs"]


def _shm() -> Shm:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return Shm(None, None)
    return Shm(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def _thp() -> Thp:
    def chosen(name: str) -> str | None:
        match = re.search(r"\[(\S+)\]", _text(SYSFS_MM / "transparent_hugepage" / name) or "")
        return match[1] if match else None

    return Thp(chosen("enabled"), chosen("shmem_enabled"))


def _limits() -> Limits:
    def limits(which: int) -> Iterator[int | None]:
        for limit in resource.getrlimit(which):
            yield None if limit == resource.RLIM_INFINITY else limit

    memlock_soft, memlock_hard = limits(resource.RLIMIT_MEMLOCK)
    nofile_soft, nofile_hard = limits(resource.RLIMIT_NOFILE)
    return Limits(
        max_map_count=_number(PROC_VM / "max_map_count"),
        memlock_soft=memlock_soft,
        memlock_hard=memlock_hard,
        nofile_soft=nofile_soft,
        nofile_hard=nofile_hard,
        nr_hugepages=_number(PROC_VM / "nr_hugepages"),
        overcommit_memory=_number(PROC_VM / "overcommit_memory"),
        unprivileged_userfaultfd=_number(PROC_VM / "unprivileged_userfaultfd"),
    )


def _python() -> Python:
    return Python(
        implementation=platform.python_implementation(),
        version=platform.python_version(),
        free_threaded_build="t" in sys.abiflags,
        gil=getattr(sys, "_is_gil_enabled", lambda: True)(),
    )


# What is missing


def _missing_ways(support: KernelSupport) -> Iterator[Missing]:
    names = {
        "syscall": "the userfaultfd system call",
        "device": "/dev/userfaultfd",
        "user_mode_only": "UFFD_USER_MODE_ONLY",
    }
    if support.opens["syscall"].works or support.opens["device"].works:
        return  # one way suffices
    said = set()
    for name, way in support.opens.items():
        if not way.works and way not in said:
            said.add(way)  # the system call with USER_MODE_ONLY fails for the same reason
            yield Missing(names[name], way.reason, way.command or None)


def _initial_id(kind: str, number: int) -> int:
    """Return an id as the parent of this user namespace has it, whose root runs the command."""
    for line in (_text(Path(f"/proc/self/{kind}_map")) or "").splitlines():
        first, parent, count = map(int, line.split())
        if first <= number < first + count:
            return parent + number - first
    return number


def _missing_features(support: KernelSupport) -> Iterator[Missing]:
    if support.refused:
        command = [
            "setpriv",
            f"--reuid={_initial_id('uid', os.geteuid())}",
            f"--regid={_initial_id('gid', os.getegid())}",
            "--init-groups",
            "--inh-caps=+sys_ptrace",
            "--ambient-caps=+sys_ptrace",
            sys.executable,
            "-m",
            "pyuffd",
            "doctor",
        ]
        yield Missing(
            ", ".join(_names(support.refused)),
            "needs CAP_SYS_PTRACE; this starts a program with it",
            shlex.join(command),
        )
    by_version: dict[str, list[str]] = {}
    for feature in _lacking(support):
        by_version.setdefault(FEATURE_SINCE[feature], []).append(str(feature.name))
    for since, names in by_version.items():
        yield Missing(", ".join(names), f"came with Linux {since}", None)
    if not support.pagemap_scan:
        yield Missing("PAGEMAP_SCAN", "it came with Linux 6.7", None)


def _missing_memory(
    swap: Swap, huge_pages: list[HugePages], hugetlbfs: list[str], thp: Thp, limits: Limits
) -> Iterator[Missing]:
    for pool in huge_pages:
        free = pool.free - pool.reserved
        if free <= 0 and pool.size in ADVISED_HUGE_PAGES:
            folder = SYSFS_MM / "hugepages" / f"hugepages-{pool.size >> 10}kB"
            wanted = pool.total + ADVISED_HUGE_PAGES[pool.size]
            yield Missing(
                f"huge pages of {size_text(pool.size)}",
                f"{pool.total} in the pool, none left",
                f"echo {wanted} > {folder}/nr_hugepages",
            )
    if not huge_pages:
        yield Missing("huge pages", "this kernel is built without CONFIG_HUGETLBFS", None)
    elif not hugetlbfs:
        yield Missing(
            "a hugetlbfs mount",
            "only for files of huge pages; memfd needs none",
            "mkdir -p /dev/hugepages && mount -t hugetlbfs none /dev/hugepages",
        )
    if not swap.total:
        yield Missing(
            "swap",
            "there is none, so anonymous and shared memory cannot be paged out",
            "fallocate -l 1G /swapfile && chmod 600 /swapfile && mkswap /swapfile"
            " && swapon /swapfile",
        )
    for name, value, wanted_value in (
        ("enabled", thp.enabled, "madvise"),
        ("shmem_enabled", thp.shmem_enabled, "advise"),
    ):
        if value in ("never", "deny"):
            yield Missing(
                "transparent huge pages" if name == "enabled" else "huge pages for shmem",
                f"{name} is {value}",
                f"echo {wanted_value} > {SYSFS_MM}/transparent_hugepage/{name}",
            )
    if limits.max_map_count is not None and limits.max_map_count < DEFAULT_MAX_MAP_COUNT:
        yield Missing(
            "mappings",
            f"vm.max_map_count is {limits.max_map_count}; a registered range is a mapping or more",
            f"sysctl vm.max_map_count={DEFAULT_MAX_MAP_COUNT}",
        )
