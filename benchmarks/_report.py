"""The environment of a run, and its results as a table, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._pairs import Row, Skipped
from pyuffd import Userfaultfd

_TITLES = ("what", "base p50", "pyuffd p50", "unit", "ratio p50", "ratio p99", "target", "")


def environment() -> dict[str, object]:
    """Return the facts that a reader needs to judge the numbers."""
    with Userfaultfd() as uffd:
        supported = int(uffd.supported)
    return {
        "commit": _commit(),
        "kernel": platform.release(),
        "uffd_features": hex(supported),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "hypervisor": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "clocksource": _sysfs("devices/system/clocksource/clocksource0/current_clocksource"),
        "memory_kib": _meminfo("MemTotal"),
        "thp": _sysfs("kernel/mm/transparent_hugepage/enabled"),
        "thp_shmem": _sysfs("kernel/mm/transparent_hugepage/shmem_enabled"),
        "huge_pages_total": _meminfo("HugePages_Total"),
        "huge_pages_free": _meminfo("HugePages_Free"),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "compiler": _first_line("gcc", "--version"),
    }


def as_json(rows: Sequence[Row | Skipped], where: dict[str, object]) -> dict[str, object]:
    """Return the content of the JSON file."""
    return {
        "environment": where,
        "rows": [
            {**dataclasses.asdict(row), "verdict": row.verdict}
            for row in rows
            if isinstance(row, Row)
        ],
        "skipped": [dataclasses.asdict(row) for row in rows if isinstance(row, Skipped)],
    }


def cells(row: Row | Skipped) -> tuple[str, ...]:
    """Return the columns of one line."""
    if isinstance(row, Skipped):
        return (row.name, "", "", "", "", "", "", f"not measured: {row.reason}")
    targets = [str(target) for target in (row.target, row.target_p99) if target]
    return (
        row.name,
        _number(row.base),
        _number(row.ours),
        row.unit,
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.ratio_p99 is None else f"{row.ratio_p99:.2f}",
        ", p99 ".join(targets),
        row.verdict,
    )


class Table:
    """A plain-text table that is printed line by line, while the benchmarks run."""

    _WIDTHS = (66, 9, 10, 10, 9, 9, 19, 0)

    def __init__(self) -> None:
        self._print(_TITLES)

    def add(self, row: Row | Skipped) -> None:
        """Print one line."""
        self._print(cells(row))

    def _print(self, columns: Sequence[str]) -> None:
        padded = (column.ljust(width) for column, width in zip(columns, self._WIDTHS, strict=True))
        print(" ".join(padded).rstrip(), flush=True)


def as_markdown(rows: Sequence[Row | Skipped], where: dict[str, object]) -> str:
    """Return the text of ``RESULTS.md``."""
    command = " ".join(["python -m benchmarks.run", *sys.argv[1:]])
    lines = [
        "# Results",
        "",
        "Made by:",
        "",
        "```",
        command,
        "```",
        "",
        "Each line is a pair of programs that took turns in one run: the base case, which is a",
        "bare C program of `benchmarks/c` unless the line says otherwise, and pyuffd. Values are",
        "medians over the runs, ratios are the median of pyuffd / base over the pairs. A line",
        "without a target is there for information.",
        "",
        "| " + " | ".join(_TITLES) + " |",
        "|---" * len(_TITLES) + "|",
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
        "| environment | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in where.items()),
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _commit() -> str:
    here = Path(__file__).resolve().parent
    git = ("git", "-C", str(here))
    try:
        commit = _first_line(*git, "rev-parse", "HEAD")
        changed = _first_line(*git, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with local changes" if changed else "")


def _first_line(*argv: str) -> str:
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return out.partition("\n")[0]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _sysfs(path: str) -> str:
    file = Path("/sys") / path
    return file.read_text().strip() if file.exists() else "unknown"


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return 0
