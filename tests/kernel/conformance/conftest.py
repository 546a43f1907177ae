"""A fixed quarter of the suite's crossings runs by default, and all with PYUFFD_CROSSINGS=all."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial

import pytest

from pyuffd.conformance import _context
from pyuffd.testing import _run
from tests import _crossings
from tests._child import FRESH, zygote

ONE_OF = 4


@pytest.fixture(autouse=True, scope="session")
def forked_children() -> Iterator[None]:
    """Fork the cases' children from one process, instead of starting Python for each."""
    with pytest.MonkeyPatch.context() as patch:
        if not FRESH:
            patch.setattr(_context, "run_child", partial(_run.run_child, start=zygote().fork))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out three of four, chosen by id, unless all or individual tests are requested."""
    if _crossings.ALL or config.option.keyword or any("::" in arg for arg in config.args):
        return
    out = {item for item in items if _is_crossing(item) and zlib.crc32(_id(item)) % ONE_OF}
    config.hook.pytest_deselected(items=[item for item in items if item in out])
    items[:] = [item for item in items if item not in out]


def _is_crossing(item: pytest.Item) -> bool:
    return item.get_closest_marker("conformance_crossing") is not None


def _id(item: pytest.Item) -> bytes:
    return item.name.partition("[")[2].encode()
