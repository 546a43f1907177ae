"""Numbers in messages: counts as people count, addresses and sizes in hexadecimal."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyuffd import FileSource, Region, UffdOSError, Userfaultfd, residency
from pyuffd._arguments import check_int, check_number
from pyuffd.remote._threads import threads_of


def test_counts_and_addresses() -> None:
    with pytest.raises(ValueError, match=r"threads 1000 is too large: it must be below 65"):
        check_int("threads", 1000, 1, 65)
    with pytest.raises(ValueError, match=r"rate -5 is negative"):
        check_number("rate", -5)
    with pytest.raises(ValueError, match=r"dst address -0x1000 is negative"):
        check_int("dst address", -4096, 0)


@pytest.mark.parametrize("no", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        FileSource,
        Region.file,
        Userfaultfd.from_fd,
        lambda fd: residency(0, 4096, fd=fd, page_size=4096),
    ],
)
def test_a_bool_is_no_descriptor(call: Callable[[Any], object], no: bool) -> None:
    with pytest.raises(TypeError, match=r"not (False|True)"):
        call(no)


def test_a_limit_of_descriptors_is_no_ended_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, **_: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UffdOSError) as caught:
        list(threads_of(1))
    assert caught.value.errno == errno.EMFILE
