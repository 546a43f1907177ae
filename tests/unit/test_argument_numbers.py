"""Numbers in messages: counts as people count, addresses and sizes in hexadecimal."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pyuffd import UffdOSError
from pyuffd._arguments import check_int, check_number
from pyuffd.remote._threads import threads_of


def test_counts_and_addresses() -> None:
    with pytest.raises(ValueError, match=r"threads 1000 is too large: it must be below 65"):
        check_int("threads", 1000, 1, 65)
    with pytest.raises(ValueError, match=r"rate -5 is negative"):
        check_number("rate", -5)
    with pytest.raises(ValueError, match=r"dst address -0x1000 is negative"):
        check_int("dst address", -4096, 0)


def test_a_limit_of_descriptors_is_no_ended_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, **_: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UffdOSError) as caught:
        list(threads_of(1))
    assert caught.value.errno == errno.EMFILE
