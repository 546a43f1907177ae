"""README.md and docs/ tell what this kernel does, and their programs run."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pyuffd import (
    Feature,
    Ioctl,
    PageBit,
    Pagemap,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
    probe,
)
from pyuffd.testing import MEMORY_TYPES, needs, needs_privilege, needs_swap
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import Expect
from tests import _readme
from tests._child import run_child
from tests._memory import Memory

TABLE = _readme.table("memory")
MODES = {
    "MISSING faults": RegisterMode.MISSING,
    "WP faults": RegisterMode.WP,
    "MINOR faults": RegisterMode.MINOR,
}
WITH_MODE = {
    "COPY": RegisterMode.MISSING,
    "ZEROPAGE": RegisterMode.MISSING,
    "MOVE": RegisterMode.MISSING,
    "POISON": RegisterMode.MISSING,
    "CONTINUE": RegisterMode.MINOR,
    "WRITEPROTECT": RegisterMode.WP,
}
ALL_OF_IT = (
    Feature.MISSING_SHMEM
    | Feature.MISSING_HUGETLBFS
    | Feature.MINOR_SHMEM
    | Feature.MINOR_HUGETLBFS
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.POISON
    | Feature.MOVE
)
# The kernel sets the bit for shmem too, but the ioctl fails with EINVAL.
BIT_WITHOUT_OPERATION = {("MOVE", "shmem"), ("MOVE", "shmem-private")}

# A program of a page is a file in a folder of its own, as if a reader had saved it.
RUN = """
import os, runpy, sys, warnings
os.chdir({folder!r})
if {warns!r}:
    warnings.simplefilter("default")
if {in_container!r}:
    from tests import seccomp_deny
    seccomp_deny.deny()
sys.argv = ["program.py"]
runpy.run_path(os.path.abspath("program.py"), run_name="__main__")
"""
# What differs from run to run: in messages addresses, numbers and the names of folders; in what a
# program prints that succeeds addresses, unless its comment says `varies=numbers`.
ADDRESSES = re.compile(r"0x[0-9a-f]+")
VARIES = re.compile(r"0x[0-9a-f]+|\b\d+(?:\.\d+)?\b|(?:/[\w.-]+)+(?=/)")
# Programs that hang say so after two seconds.
HANG_S = 8.0  # the watch speaks after two seconds, once Python has started
EXPECTED: dict[str, Expect] = {"": 0, "warning": 0, "error": 1, "hangs": "timeout"}
# Beside these there are Sphinx's directives, in braces.
KNOWN_FENCES = {"python", "py", "console", "text", "c", "json", "yaml"}


def marks(program: _readme.Program) -> list[pytest.MarkDecorator]:
    """Return what a program needs, from the names in the comment before it."""
    return [NEEDS[name]() if name in NEEDS else need_by_name(name) for name in program.needs]


def need_by_name(name: str) -> pytest.MarkDecorator:
    return needs_privilege(name) if name.startswith("CAP_") else needs(Feature[name])


def needs_refusal() -> pytest.MarkDecorator:
    """Skip where everybody may open a userfaultfd, so that the error cannot be shown."""
    sysctl = Path("/proc/sys/vm/unprivileged_userfaultfd")
    allowed = sysctl.exists() and sysctl.read_text().strip() != "0"
    return pytest.mark.skipif(allowed, reason="vm.unprivileged_userfaultfd allows it to everybody")


def needs_lack(feature: Feature) -> pytest.MarkDecorator:
    """Skip where the kernel has what the program is refused for."""
    has = bool(probe().features & feature)
    return pytest.mark.skipif(has, reason=f"this kernel has {feature.name}")


NEEDS: dict[str, Callable[[], pytest.MarkDecorator]] = {
    "kernel-faults": needs_kernel_faults,
    "sysctl-0": needs_refusal,
    "swap": needs_swap,
    "lacks-RWP": lambda: needs_lack(Feature.RWP),
}


PROGRAMS = [
    pytest.param(program, id=f"{page.relative_to(_readme.ROOT)}-{number}", marks=marks(program))
    for page in _readme.PAGES
    for number, program in enumerate(_readme.programs(page))
]


def test_table_is_complete() -> None:
    assert list(TABLE) == [*MODES, *WITH_MODE]
    assert {tuple(cells) for cells in TABLE.values()} == {tuple(MEMORY_TYPES)}


@needs(ALL_OF_IT)
def test_table_against_the_ioctls_of_registered_ranges() -> None:
    found = probe().memory
    for row, cells in TABLE.items():
        for memory, cell in cells.items():
            if row in MODES:
                offered = bool(found[memory][MODES[row]].ioctls)
            else:
                offered = bool(found[memory][WITH_MODE[row]].ioctls & Ioctl[row])
            expected = cell == "yes" or (row, memory) in BIT_WITHOUT_OPERATION
            assert (row, memory, offered) == (row, memory, expected)


@needs(ALL_OF_IT)
@pytest.mark.parametrize("operation", WITH_MODE)
def test_table_against_the_operations(memory: Memory, operation: str) -> None:
    assert do(operation, memory) == TABLE[operation][memory.name]


def do(operation: str, memory: Memory) -> str:
    """Do one operation on a page; return the matching cell of the table."""
    features = ALL_OF_IT | Feature.PAGEFAULT_FLAG_WP
    size = memory.page_size
    target, source = memory.pages(1), memory.pages(1)
    source.fill(1)
    with contextlib.ExitStack() as stack:
        uffd = stack.enter_context(Userfaultfd(features=features))
        if operation in ("CONTINUE", "WRITEPROTECT") and target.fd is not None:
            with Region.file(target.fd) as cache:
                cache.fill(1)
        if operation == "WRITEPROTECT":
            target.touch(0)
        try:
            uffd.register(target, mode=WITH_MODE[operation])
            match operation:
                case "COPY":
                    done = uffd.copy(target.start, source.start, size)
                case "ZEROPAGE":
                    done = uffd.zeropage(target)
                case "MOVE":
                    done = uffd.move(target.start, source.start, size)
                case "POISON":
                    done = uffd.poison(target)
                case "CONTINUE":
                    done = uffd.continue_(target)
                case _:
                    uffd.writeprotect(target)
                    with Pagemap() as pagemap:
                        done = size * (PageBit.UFFD_WP in pagemap.read(target).at(target.start))
        except UffdOSError as error:
            if error.errno != errno.EINVAL:
                raise
            return "no"
    assert done == size
    return "yes"


def ends(program: _readme.Program) -> Expect:
    """Return how the child is expected to end."""
    if program.ends in EXPECTED:
        return EXPECTED[program.ends]
    return -signal.Signals[program.ends]


def test_there_is_a_program() -> None:
    assert len(_readme.programs(_readme.README)) >= 1


def test_the_first_program_is_short() -> None:
    first = _readme.programs(_readme.README)[0].source
    lines = [line for line in first.splitlines() if line.strip()]
    assert len(lines) == 5
    assert "pyuffd.lazy(" in first


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: _readme.Program) -> None:
    # A short name, as messages cut long ones.
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        Path(folder, "program.py").write_text(program.source)
        result = run_child(
            RUN.format(
                folder=folder,
                warns=program.ends == "warning",
                in_container=program.in_container,
            ),
            budget_s=HANG_S if program.ends == "hangs" else 10,
            expect=ends(program),
        )
    varies = VARIES if program.ends or program.numbers_vary else ADDRESSES
    found = [varies.sub("N", line) for line in (result.stdout + result.stderr).splitlines()]
    assert found or program.ends
    for line in program.output:
        start, more, _ = varies.sub("N", line).partition(" ...")
        matching = (at for at, text in enumerate(found) if is_line(text, start, bool(more)))
        at = next(matching, None)
        assert at is not None, f"not printed: {line}\n{result.stdout}{result.stderr}"
        del found[: at + 1]


def is_line(text: str, start: str, more: bool) -> bool:
    """Return whether a line that was printed is the one shown, of which an end may be left out."""
    return text.startswith(start) if more else text == start


def test_an_unknown_fence_is_no_program_that_nobody_runs() -> None:
    """Blocks of Python are `python` and run here, or `py` and run by test_testing_kit.py.

    Those of a shell are `console` and run by tests/process/test_sessions.py.
    """
    for page in _readme.PAGES:
        fences = set(re.findall(r"^\s*```([^{\s]\S*)", page.read_text(), re.MULTILINE))
        assert fences <= KNOWN_FENCES, page
        # The server of criu.md needs an image that CRIU made; `make criu` serves some.
        if "py" in fences:
            assert page.name in ("testing.md", "criu.md")
