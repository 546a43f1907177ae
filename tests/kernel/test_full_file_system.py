"""Served memory of a tmpfs that is full: the error names the file system."""

from __future__ import annotations

import errno
import os

import pytest

from pyuffd import BufferSource, CallableSource, Feature, Handler, Region, UffdOSError, Userfaultfd
from pyuffd.testing import needs_privilege
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._mounts import mounted
from tests.kernel._serving import content
from tests.kernel._verbs import Driver

PAGES = 8


def full(driver: Driver) -> None:
    from pyuffd.handlers import _handler

    _handler.RETRY_LIMIT_S = 0.2
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    data = content(PAGES * PAGE)
    with (
        mounted("tmpfs", size=f"{PAGES * PAGE}") as folder,
        open(f"{folder}/region", "w+b") as file,
        open(f"{folder}/other", "wb") as other,
        Userfaultfd(features=features) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        os.truncate(file.fileno(), PAGES * PAGE)
        source, half = BufferSource(data), PAGES // 2 * PAGE
        with Region.file(file) as region:
            handler.serve(region, CallableSource(source.read) if driver == "thread" else source)
            other.write(bytes(half))
            other.flush()
            assert region.read(0, half) == data[:half]
            with pytest.raises(UffdOSError, match=r"file system of .*region is full") as caught:
                handler.populate(region)
            assert caught.value.errno == errno.ENOMEM
            other.truncate(0)
            handler.retry(region)
            assert handler.populate(region) == half
            assert region.read() == data


@needs_privilege("CAP_SYS_ADMIN")
@pytest.mark.parametrize("driver", ["native", "inline", "thread"])
def test_is_named(driver: Driver) -> None:
    run_child(full, driver)
