"""Every example runs, prints what it did, and is as short as promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyuffd import Feature
from pyuffd.testing import needs, needs_hugepages, needs_privilege
from pyuffd.testing._huge_pages import free_hugepages
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BUDGET_S = 20.0
MAX_LINES = 100
PROGRAM = """
import runpy, sys
sys.argv = [{path!r}]
runpy.run_path({path!r}, run_name="__main__")
"""

# The needs of each example, and lines that it prints if everything works.
EXPECTED: dict[str, tuple[list[pytest.MarkDecorator], list[str]]] = {
    "01_manpage": ([], ["filled with C"]),
    "02_lazy_file_numpy": ([], ["sum of numbers 3999990 to 3999999: 39999945", "pages loaded"]),
    "03_dirty_pages_shmem": (
        [needs(Feature.WP_HUGETLBFS_SHMEM | Feature.WP_ASYNC)],
        ["by faults: pages [3, 4, 200]", "by scan:   pages [3, 4, 200]", "by scan:   pages [4]"],
    ),
    "04_minor_continue": (
        [needs(Feature.MINOR_SHMEM)],
        ["minor fault on page 3", "page 3: COPIES"],
    ),
    "05_poison": (
        [needs(Feature.POISON), needs_kernel_faults()],
        [
            "page 3, by a system call: Bad address",
            "page 3, by Region.read(): PagePoisonedError",
            "page 3, by a program: SIGBUS",
        ],
    ),
    "06_hugetlb": ([needs_hugepages(4)], ["2 faults; pages: ABSENT, CLEAN, ABSENT, CLEAN"]),
    "07_inline_sigbus": ([needs(Feature.SIGBUS)], ["3 faults", "write(2) wrote 16384"]),
    "08_monitor_asyncio": ([needs_kernel_faults()], ["read ABCDEFGH", "8 pages filled"]),
    "09_fault_timeline": ([needs_kernel_faults()], ["faults drawn in "]),
    "10_dirty_rounds": (
        [needs(Feature.WP_ASYNC)],
        ["round 0: 4 pages", "round 2: 8 pages", "the copy is right", "cannot be seen: nothing"],
    ),
    "11_callable_source": (
        [],
        ["1000 squared is 1000000", "1048575 squared is 1099509530625", "3 of 2048 pages"],
    ),
    "12_track_process": (
        [needs(Feature.WP_ASYNC), needs_privilege("CAP_SYS_PTRACE")],
        ["mappings, method wp-async", "round 2:", "the process was left as it was"],
    ),
    "13_post_copy": (
        [needs_kernel_faults()],
        ["4096 pages came, ", "all of the memory has arrived"],
    ),
    "14_incremental_snapshot": (
        [needs(Feature.PAGEFAULT_FLAG_WP)],
        ["snapshot 0: 2048 pages in 1 ranges", "the increments make up the memory"],
    ),
    "15_window": (
        [needs(Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED), needs_kernel_faults()],
        ["400 numbers read back; "],
    ),
    "16_snapshot_process": (
        [needs(Feature.WP_ASYNC), needs_privilege("CAP_SYS_PTRACE")],
        ["it was stopped for"],
    ),
    "17_restore": (
        [needs(Feature.WP_ASYNC), needs_kernel_faults(), needs_privilege("CAP_SYS_PTRACE")],
        ["32 MiB saved", "300 pages were waited for, and recorded", "working set: 0 pages"],
    ),
}


# The lines that the library itself writes to stderr.
SAID = {"05_poison": "pyuffd: page "}


def test_every_example_is_expected() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == list(EXPECTED)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks) for name, (marks, _) in EXPECTED.items()]
)
def test_example(name: str) -> None:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < MAX_LINES
    result = run_child(PROGRAM.format(path=str(path)), budget_s=BUDGET_S)
    assert result.stderr.startswith(SAID.get(name, ""))
    assert bool(result.stderr) == (name in SAID)
    for line in EXPECTED[name][1]:
        assert line in result.stdout


def test_hugetlb_without_huge_pages_says_how_to_get_some() -> None:
    source = (EXAMPLES / "06_hugetlb.py").read_text()
    too_many = source.replace("PAGES = 4\n", f"PAGES = {free_hugepages() + 1000}\n")
    assert "sysctl vm.nr_hugepages=" in run_child(too_many).stdout
    more_than_all = source.replace("PAGES = 4\n", "PAGES = 1 << 20\n")
    assert "a pool of 2" in run_child(more_than_all).stdout
