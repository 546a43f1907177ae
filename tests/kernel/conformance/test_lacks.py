"""Cases on a kernel that lacks what they are about: skipped, and not failed."""

from __future__ import annotations

import errno
import os

import pytest

from pyuffd.conformance import load
from pyuffd.conformance._thp import MADV_COLLAPSE
from pyuffd.regions import Region
from tests.vm import _cases

CASES = {name: case for name, case in load().items() if name.startswith("thp.collapse.")}


@pytest.mark.parametrize("test", [test for case in CASES.values() for test in case.ids])
def test_without_madv_collapse(test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Region.madvise

    def madvise(region: Region, advice: int, offset: int = 0, length: int | None = None) -> None:
        if advice == MADV_COLLAPSE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        usual(region, advice, offset, length)

    monkeypatch.setattr(Region, "madvise", madvise)
    name, memory = _cases.split(test)
    assert _cases.run(CASES[name], memory) in (_cases.PASSED, _cases.SKIPPED)
