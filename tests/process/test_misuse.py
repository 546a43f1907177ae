"""Every public call with values that are wrong for anything: an error with a sentence, no other.

The calls and parameters come from the signatures, so that new ones are tried too. Whether the error
names the right parameter is tried by tests/kernel/test_bad_arguments.py.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

import pyuffd
from pyuffd import (
    BufferSource,
    Feature,
    FileSource,
    OverlaySource,
    PageBit,
    Pagemap,
    Region,
    RegisterMode,
    UffdError,
    ZeroSource,
)
from tests._child import run_child
from tests._memory import PAGE
from tests.process._tracking import OF_OTHERS
from tests.process.test_closed_objects import MAKE, World

pytestmark = OF_OTHERS

BAD: list[Any] = [
    *(None, -1, 1 << 63, 1 << 64, 10**30, 1.5, math.nan, "x", "a\0b", b"x", True),
    *([], [1], {}, (1, 2), [(2, 1)], object(), int),
]
LIMIT_S = 5.0
# They end what the others use, or wait for as long as they are told.
LEFT_OUT = {
    *("close", "stop", "detach", "release", "accept", "wait_exit", "wait", "wait_hot"),
    *("outlives_close",),
}
# Of these this library makes the objects; those made otherwise are not checked.
RESULTS = {
    *("Blind", "Copied", "CoreFile", "DirtyRound", "Event", "FaultLog", "FillResult", "Fork"),
    *("Grown", "HandlerStats", "KernelSupport", "Latency", "LayoutChange", "LoggedFault"),
    *("Mapped", "Mapping", "Mappings", "Moved", "PageEntries", "PageRange", "PageRanges"),
    *("Pagefault", "Promised", "Protected", "RecentFault", "RegisterSet", "Remap", "Remove"),
    *("Residency", "RestoreStats", "Restore", "ScanResult", "SnapshotGap", "SnapshotProgress"),
    *("SnapshotRegion", "SnapshotReport", "SnapshotRun", "StateRange", "StateRanges", "Stop"),
    *("Thread", "UnknownEvent", "Unmap", "Unmapped", "WorkingSet", "WorkingSetRun", "Checkpoint"),
    *("HandoverRange", "LazyRegion", "PageSource"),
}


class TookTooLongError(BaseException):
    pass


def give_up(_number: int, _frame: object) -> None:
    raise TookTooLongError


def objects(world: World, good: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    handler = world.handler()
    (served,) = handler._served.values()
    good.update(region=served.region, handler=handler)
    yield "Handler", handler
    for name, make in MAKE.items():
        if name not in ("Handler", "Stop"):
            made = make(world)
            world.stack.callback(made.close)
            yield name, made
    yield "PageEntries", Pagemap().read(good["memory"])
    yield "Residency", good["memory"].residency()
    yield "Mappings", world.process.mappings()
    yield "BufferSource", BufferSource(bytes(PAGE))
    yield "ZeroSource", ZeroSource()


def calls(world: World, good: dict[str, Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, made in objects(world, good):
        for member in dir(type(made)):
            if not member.startswith("_") and member not in LEFT_OUT:
                with suppress(UffdError, LookupError, ValueError):
                    yield f"{name}.{member}", getattr(made, member)
    for name in pyuffd.__all__:
        public = getattr(pyuffd, name)
        is_error = isinstance(public, type) and issubclass(public, BaseException)
        if name not in RESULTS and not is_error:
            yield name, public


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Return what is wrong with what a call does; "" if nothing is."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        made = call(**arguments)
        if hasattr(made, "close"):
            with suppress(UffdError, TypeError):
                made.close()
    except TookTooLongError:
        return "it waits"
    except (TypeError, ValueError, UffdError, LookupError, OSError, MemoryError) as error:
        text = str(error)
        if not text or isinstance(error, KeyError):
            return f"{type(error).__name__} without a word"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def misuse(folder: str) -> list[str]:
    found = []
    os.chdir(folder)  # "x" is the name of a file too
    signal.signal(signal.SIGALRM, give_up)
    warnings.simplefilter("ignore")
    with ExitStack() as stack:
        world = World(stack, folder)
        memory = world.region()
        good: dict[str, Any] = {
            "memory": memory,
            "range_or_start": memory,
            "offset": 0,
            "length": PAGE,
            "start": memory.start,
            "address": memory.start,
            "dst": memory.start,
            "src": bytes(PAGE),
            "mode": RegisterMode.MISSING,
            "source": ZeroSource(),
            "data": bytes(PAGE),
            "path": f"{folder}/made",
            "uffd": world.uffd(),
            "process": world.process,
            "target": bytearray(PAGE),
            "ranges": [memory],
            "value": 1,
            "bits": PageBit.PRESENT,
            "features": Feature(0),
            "advice": 4,
            "name": "made",
            "file": __file__,
        }
        for name, call in calls(world, good):
            try:
                signature = inspect.signature(call)
            except (TypeError, ValueError):
                continue
            if inspect.iscoroutinefunction(call):
                continue
            given = {
                one.name: good.get(one.name)
                for one in signature.parameters.values()
                if one.default is one.empty
                and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
            }
            for one in signature.parameters.values():
                if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                    continue
                for value in BAD:
                    problem = outcome(call, given | {one.name: value})
                    if problem:
                        found.append(f"{name}({one.name}={value!r:.30}): {problem}")
    return found


def test_nothing_from_inside() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run_child(misuse, folder, budget_s=100).value
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("offset", "length"), [(-PAGE, PAGE), (0, -1), (1 << 63, 1), (1, 1 << 63)])
def test_a_source_has_nothing_before_its_begin(offset: int, length: int) -> None:
    """BufferSource returned the memory before the buffer, FileSource what precedes its offset."""
    with Region.memfd(4 * PAGE) as memory:
        assert memory.fd is not None
        memory.write(0, b"before")
        with FileSource(memory.fd, offset=2 * PAGE) as file:
            buffer = BufferSource(memory.memoryview()[2 * PAGE :])
            overlay = OverlaySource([(0, PAGE, buffer)])
            for source in (file, buffer, overlay, ZeroSource()):
                with pytest.raises(ValueError, match=r"offset|length"):
                    source.read(offset, length)
            del buffer, overlay, source
