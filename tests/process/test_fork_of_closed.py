"""The owner closes a region while a fork still lacks pages of it: never zeros there."""

from __future__ import annotations

import contextlib
import os
from typing import Literal

import pytest

from pyuffd import BufferSource, Feature, Handler, Userfaultfd
from pyuffd.testing import needs
from tests._child import run_child
from tests._memory import memory_of, memory_params
from tests.kernel._serving import content, is_lost
from tests.process._pitfalls import Data

EVENTS = Feature.EVENT_FORK | Feature.EVENT_UNMAP


def closed(driver: Literal["native", "thread", "process"], memory: str, events: Feature) -> None:
    with (
        contextlib.closing(memory_of(memory)) as make,
        Userfaultfd(features=events) as uffd,
        Handler(uffd, driver=driver) as handler,
    ):
        region = make.pages(3)
        size, data = make.page_size, content(region.length)
        handler.serve(region, BufferSource(data) if driver == "native" else Data(data))
        assert region.read(0, size) == data[:size]
        go, gone = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(gone)
                os.read(go, 1)  # the parent has closed the region
                for page in range(3):
                    at = page * size
                    assert is_lost(region, at, size) or region.read(at, size) == data[at:][:size]
                assert region.read(0, size) == data[:size]
                code = 0
            finally:
                os._exit(code)
        os.close(go)
        region.close()
        os.close(gone)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.crossing
@needs(EVENTS)
@pytest.mark.parametrize("events", [Feature.EVENT_FORK, EVENTS], ids=["fork", "fork-unmap"])
@pytest.mark.parametrize("memory", memory_params())
@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_closed_by_its_owner(
    driver: Literal["native", "thread", "process"], memory: str, events: Feature
) -> None:
    run_child(closed, driver, memory, events)
