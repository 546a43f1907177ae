"""The limits that control groups, v1 or v2, set for this process (layer L6)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# In cgroup v1 the largest multiple of the page size that fits a long means "no limit".
_V1_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Limits:
    """The lowest limit among this process's group and those above it; None without a limit.

    `memory`, `swap` and `hugetlb_2m` are in bytes, `cpus` is a number of processors.
    """

    memory: int | None
    swap: int | None
    hugetlb_2m: int | None
    cpus: float | None


def limits(proc: Path = Path("/proc/self")) -> Limits:
    """Read the limits of the process that `proc` is the folder of."""

    def tightest(
        controller: str, v2: str | None, v1: str | None, parse: Callable[[Path], float | None]
    ) -> float | None:
        found = []
        for version, folder in _folders(proc, controller):
            name = v2 if version == 2 else v1
            with contextlib.suppress(OSError):
                limit = parse(folder / name) if name is not None else None
                if limit is not None:
                    found.append(limit)
        return min(found, default=None)

    memory = tightest("memory", "memory.max", "memory.limit_in_bytes", _bytes)
    swap = tightest("memory", "memory.swap.max", None, _bytes)
    with_swap = tightest("memory", None, "memory.memsw.limit_in_bytes", _bytes)
    if swap is None and with_swap is not None:
        swap = with_swap - (memory or 0)
    hugetlb = tightest("hugetlb", "hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes", _bytes)
    return Limits(
        memory=_whole(memory),
        swap=_whole(swap),
        hugetlb_2m=_whole(hugetlb),
        cpus=tightest("cpu", "cpu.max", "cpu.cfs_quota_us", _cpus),
    )


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None else None


def _bytes(path: Path) -> float | None:
    text = path.read_text().strip()
    return None if text == "max" or int(text) >= _V1_UNLIMITED else int(text)


def _cpus(path: Path) -> float | None:
    quota, *period = path.read_text().split()
    if quota in ("max", "-1"):
        return None
    if not period:
        period = [path.with_name("cpu.cfs_period_us").read_text()]
    return int(quota) / int(period[0])


def _folders(proc: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of the groups that govern this process, innermost first."""
    groups = {}
    for line in (proc / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            groups[2] = path
        elif controller in controllers.split(","):
            groups[1] = path
    for line in (proc / "mountinfo").read_text().splitlines():
        fields, _, after = line.partition(" - ")
        root, mount_point = fields.split()[3:5]
        kind, _, options = after.split()[:3]
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version not in groups or (version == 1 and controller not in options.split(",")):
            continue
        # In a container the group's path may lie outside the mounted tree.
        inner = os.path.relpath(groups[version], root)
        folder = Path(mount_point) if inner.startswith("..") else Path(mount_point, inner)
        while folder.is_relative_to(mount_point):
            yield version, folder
            folder = folder.parent
