"""A process that gives up its privileges after its handler has started."""

from __future__ import annotations

import os

import pytest

from pyuffd import CallableSource, Feature, Handler, Region, Userfaultfd
from pyuffd.testing import child_pids, needs_privilege
from tests._child import run_child
from tests._memory import PAGE
from tests.kernel._serving import content
from tests.kernel._verbs import DRIVERS, Driver
from tests.process._process_sources import page

NOBODY = 65534


def serve_as_nobody(driver: Driver) -> None:
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    before = child_pids()
    with Userfaultfd(features=features) as uffd, Region.anonymous(4 * PAGE) as region:
        handler = Handler(uffd, driver=driver)
        source = content(4 * PAGE) if driver in ("native", "inline") else CallableSource(page)
        with handler:
            handler.serve(region, source)
            first = region.read(0, 16)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            assert region.read(PAGE, 16) != first
            handler.populate(region)
        assert region.read(0, 16) == first
    assert child_pids() == before


@needs_privilege("CAP_SYS_ADMIN")
@pytest.mark.parametrize("driver", DRIVERS)
def test_stop(driver: Driver) -> None:
    run_child(serve_as_nobody, driver)
