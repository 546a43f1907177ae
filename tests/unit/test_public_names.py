"""What is public is what the reference pages in docs/reference/ describe: no name more or less."""

from __future__ import annotations

import builtins
import errno
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import pytest

import pyuffd
import pyuffd.testing
from pyuffd import UffdOSError
from pyuffd._errors import raise_errno
from tests import _readme
from tests._child import limit_s

DESCRIBED = re.compile(
    r"^\.\. (?:autoclass|autofunction|autodata|py:data):: ([\w.]+)", re.MULTILINE
)
SECTIONS = ("GIL:", "Threads:", "Blocks:")
# These only return what the object knows.
ASKS_NOBODY = {"Process.fileno", "Userfaultfd.fileno", "Region.outlives_close"}
PAGES = sorted((_readme.DOCS / "reference").glob("*.md"))


def described() -> Counter[str]:
    """Return how many times each name is described."""
    return Counter(name for page in PAGES for name in DESCRIBED.findall(page.read_text()))


@pytest.mark.parametrize("module", [pyuffd, pyuffd.testing])
def test_every_public_name_has_its_place_in_the_reference(module: ModuleType) -> None:
    """A new public name gets a directive in the page of its topic; one that goes loses it."""
    names = {f"{module.__name__}.{name}" for name in module.__all__}
    found = {name for name in described() if name.rpartition(".")[0] == module.__name__}
    assert found == names


def test_no_name_is_described_twice() -> None:
    assert [name for name, count in described().items() if count > 1] == []


def test_public_names_do_not_overlap_with_private_modules() -> None:
    assert [name for name in pyuffd.__all__ if name.startswith("_")] == []


def test_every_class_is_described_with_its_members() -> None:
    """A page with autoclass alone would leave its methods out."""
    bare = re.compile(r"^\.\. autoclass:: ([\w.]+)\n(?!   :members:)", re.MULTILINE)
    assert [name for page in PAGES for name in bare.findall(page.read_text())] == []


def methods() -> Iterator[tuple[str, str]]:
    """Yield name and docstring of every public method of the classes whose methods may wait."""
    for cls in (
        pyuffd.DirtyTracker,
        pyuffd.Handler,
        pyuffd.Process,
        pyuffd.Region,
        pyuffd.Userfaultfd,
    ):
        for name, method in inspect.getmembers(cls, inspect.isroutine):
            if not name.startswith("_"):
                yield f"{cls.__name__}.{name}", inspect.getdoc(method) or ""


def test_a_method_says_how_it_waits() -> None:
    """Whether it releases the GIL, whether threads may share the object, how long it may wait."""
    texts = dict(methods())
    assert texts.keys() >= ASKS_NOBODY
    silent = [
        f"{name} lacks {section}"
        for name, text in texts.items()
        if name not in ASKS_NOBODY
        for section in SECTIONS
        if section not in text
    ]
    assert silent == []


def test_the_table_of_errnos() -> None:
    table = _readme.table("errno")
    named = {row for row in table if hasattr(errno, row)}
    for row in named:
        with pytest.raises(UffdOSError) as raised:
            raise_errno("ioctl", getattr(errno, row))
        cells = table[row]
        assert cells["exception"] == f"`{type(raised.value).__name__}`"
        assert isinstance(raised.value, getattr(builtins, cells["also"]))
    for name in set(errno.errorcode.values()) - named:
        with pytest.raises(UffdOSError) as raised:
            raise_errno("ioctl", getattr(errno, name))
        assert type(raised.value) is UffdOSError, name


def test_the_import_is_small() -> None:
    """Each of these needs as long as a large part of pyuffd, and few programs need all."""
    large = ("asyncio", "ctypes", "json", "pathlib", "psutil", "socket", "subprocess", "tempfile")
    program = f"import sys, pyuffd; print(sorted(sys.modules.keys() & {set(large)}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"],
        capture_output=True,
        text=True,
        timeout=limit_s(60),
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
