"""A process that does nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from pyuffd import Process


@pytest.fixture
def process() -> Iterator[Process]:
    """A sleeping process, for as long as the test lasts."""
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            with Process(child.pid) as process:
                yield process
        finally:
            child.kill()
