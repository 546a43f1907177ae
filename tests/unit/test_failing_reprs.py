"""Errors about arguments whose repr() raises, is very long, or has several lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyuffd import CallableSource, Feature, Handler, ZeroSource, lazy
from pyuffd.criu import RemotePages
from tests.unit.test_handler_options import FakeUserfaultfd


class Raising:
    def __repr__(self) -> str:
        raise LookupError("no repr")


class Long:
    def __repr__(self) -> str:
        return "long\n" * 1_000_000


@pytest.fixture
def uffd() -> Iterator[Any]:
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    yield FakeUserfaultfd(read_fd, Feature(0))
    os.close(read_fd)
    os.close(write_fd)


class Coroutine:
    """What looks like a coroutine function to `CallableSource`."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)

    async def __call__(self, offset: int, length: int) -> bytes:
        return bytes(length)


Call = Callable[[Any, Any], object]
CALLS: dict[str, Call] = {
    "driver": lambda uffd, value: Handler(uffd, driver=value),
    "on_error": lambda uffd, value: Handler(uffd, on_error=value),
    "kind": lambda uffd, value: lazy(ZeroSource(), length=4096, kind=value),
    "wire": lambda uffd, value: RemotePages("localhost", 1, wire=value),
    "function": lambda uffd, value: CallableSource(Coroutine(value).__call__),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [Raising(), Long()], ids=["raising", "long"])
def test_are_about_the_argument(name: str, value: object, uffd: Any) -> None:
    with pytest.raises(ValueError) as caught:
        CALLS[name](uffd, value)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
