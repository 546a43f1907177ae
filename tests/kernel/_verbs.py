"""Shared by the tests of a handler's methods: a handler of each driver, and a table of cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal, get_args

from pyuffd import (
    Feature,
    Handler,
    HandlerStats,
    PageSource,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from tests._memory import memory_of

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
TRACKING = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
ABSENT, CLEAN, DIRTY = PageState.ABSENT, PageState.CLEAN, PageState.DIRTY
REMOVED, SAVED = PageState.REMOVED, PageState.SAVED
NEEDED = TRACKING | Feature.EVENT_REMOVE | Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
PAGES = 4

Driver = Literal["native", "inline", "thread", "process"]
DRIVERS: tuple[Driver, ...] = get_args(Driver)
PYTHON: tuple[Driver, ...] = ("thread", "process")
Case = Callable[[Handler, str], None]


@contextmanager
def handling(driver: Driver, **options: Any) -> Iterator[Handler]:
    """A running handler. With the process driver it starts slowly, so the cases share it."""
    features = TRACKING | Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
    features |= Feature.SIGBUS if driver == "inline" else Feature.EVENT_REMOVE
    with (
        Userfaultfd(features=features) as uffd,
        Handler(uffd, driver=driver, **options) as handler,
    ):
        yield handler


@contextmanager
def filling(
    handler: Handler,
    name: str,
    source: PageSource | None = None,
    mode: RegisterMode = MISSING,
    preserve: Any = None,
    *,
    holes: bool = False,
) -> Iterator[Region]:
    """A new region of four pages, served; without a source it is present if the mode is WP."""
    with closing(memory_of(name, holes=holes)) as memory:
        region = memory.pages(PAGES)
        if mode == WP:
            region.fill(1)
        elif source is None:
            source = ZeroSource()
        handler.serve(region, source, mode=mode, preserve=preserve)
        yield region


def added(handler: Handler, before: HandlerStats, name: str) -> int:
    """By how much a counter has grown."""
    return int(getattr(handler.stats(), name)) - int(getattr(before, name))


def run_cases(cases: dict[str, Case], handler: Handler, name: str) -> None:
    for what, case in cases.items():
        try:
            case(handler, name)
        except BaseException as error:
            error.add_note(f"{what} with {handler.driver}")
            raise
