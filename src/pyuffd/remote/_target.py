"""What stopping and attaching need of the `Process` that calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pyuffd.pagemap import Pagemap
from pyuffd.remote._mappings import Mappings
from pyuffd.remote._threads import Thread


class Target(Protocol):
    """A running process; `Process` describes the members."""

    @property
    def pid(self) -> int: ...
    @property
    def memory_tid(self) -> int: ...
    @property
    def pagemap(self) -> Pagemap: ...
    def check(self) -> None: ...
    def mappings(self) -> Mappings: ...
    def threads(self) -> Sequence[Thread]: ...
    def read(self, start: int, length: int) -> bytes: ...
