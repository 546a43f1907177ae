"""A descriptor, a mapping, a thread or a process never gets a second owner."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import gc
import importlib
import inspect
import mmap
import multiprocessing
import os
import pickle
import pkgutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest

import pyuffd
import pyuffd.conformance
import pyuffd.testing
from pyuffd import (
    AsyncSource,
    BufferSource,
    CallableSource,
    DirtyRound,
    DirtyTracker,
    FileSource,
    Handler,
    LazyRegion,
    OverlaySource,
    Pagemap,
    PageSource,
    Process,
    Region,
    Restore,
    Snapshot,
    Userfaultfd,
    ZeroSource,
    _memory,
    _owned,
    lazy,
)
from pyuffd._async import EventIterator
from pyuffd._closing import SoleOwner
from pyuffd._dirty_calls import DropReader
from pyuffd._remote_calls import StoppedThreads
from pyuffd._saver_calls import Saver
from pyuffd.conformance._context import Access, Child, Context, Monitor
from pyuffd.criu._page_server import RemotePages
from pyuffd.criu._remote import PageBroker
from pyuffd.criu._server import LazyPages, _Spare
from pyuffd.handlers._bounce import Bounce
from pyuffd.handlers._engine import Engine
from pyuffd.handlers._holding import Hold
from pyuffd.handlers._threads import WorkedEngine
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.handover import Handover, HandoverRange, UnixListener, listen_unix, recv_uffd, send_uffd
from pyuffd.remote._stop import Stop
from pyuffd.snapshot._core_file import NewFile
from pyuffd.snapshot._reading import Image
from pyuffd.testing import (
    DelayedSource,
    FailingSource,
    FaultingChild,
    GatedSource,
    PendingChange,
    Step,
    WrongLengthSource,
    layout_change_pending,
    needs,
    no_leaks,
)
from tests import _images
from tests._child import run_child

PAGE = 4096
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
ALWAYS = pyuffd.Feature(0)
REMOVE = pyuffd.Feature.EVENT_REMOVE

Made = contextlib.AbstractContextManager[object]


def _handed_over() -> Iterator[Handover]:
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd() as uffd, Region.memfd(PAGE) as region:
        send_uffd(theirs, uffd, [region], memory=True)
        with recv_uffd(ours) as handover:
            yield handover


def _engine_of(driver: str) -> Iterator[object]:
    with Userfaultfd() as uffd, Handler(uffd, driver=driver) as handler:  # type: ignore[arg-type]
        yield handler._engine


def _step() -> Iterator[Step]:
    with FaultingChild(pages=1) as child:
        yield child.begin("touch", 0)


def _pending() -> Iterator[PendingChange]:
    with Userfaultfd(features=REMOVE) as uffd, Region.anonymous(PAGE) as region:
        uffd.register(region)
        with layout_change_pending(uffd, region) as pending:
            yield pending


def _handler() -> Iterator[Handler]:
    with Userfaultfd() as uffd, Handler(uffd) as handler:
        yield handler


def _hold() -> Iterator[Hold]:
    with Userfaultfd() as uffd, Handler(uffd) as handler, handler.hold() as hold:
        yield hold


def _events() -> Iterator[object]:
    with Userfaultfd() as uffd:
        yield uffd.events()


def _agent() -> Iterator[_memory.Agent]:
    ours, theirs = socket.socketpair()
    with theirs:
        child = _memory.Agent(theirs.fileno(), ours.fileno())
    yield child
    ours.close()
    os.waitpid(child.pid, 0)


def _listener() -> Iterator[UnixListener]:
    with listen_unix(f"/var/tmp/pyuffd-test-{os.getpid()}") as listener:
        yield listener


def _access() -> Iterator[Access[None]]:
    with contextlib.closing(Access(lambda: None)) as access:
        yield access


def _monitor() -> Iterator[Monitor]:
    with Userfaultfd() as uffd, contextlib.closing(Monitor(uffd, lambda _: None)) as monitor:
        yield monitor


def _context_child() -> Iterator[Child]:
    ours, theirs = socket.socketpair()
    with theirs:
        agent = _memory.Agent(theirs.fileno(), ours.fileno())
    with contextlib.closing(Child(lambda _address, _pid: "", agent, ours)) as child:
        yield child


def _context() -> Context:
    return Context(next(iter(pyuffd.conformance.load().values())), "anon")


def _tracker() -> Iterator[DirtyTracker]:
    with Region.anonymous(PAGE) as region, DirtyTracker(region) as tracker:
        yield tracker


def _target() -> Iterator[Process]:
    with (
        subprocess.Popen(["sleep", "60"]) as child,
        contextlib.closing(Process(child.pid)) as process,
    ):
        yield process
        child.kill()


def _stop() -> Iterator[Stop]:
    for process in _target():
        with process.stopped() as stop:
            yield stop


def _stopped_threads() -> Iterator[StoppedThreads]:
    for process in _target():
        with process.stopped() as stop:
            yield stop._held


def _round() -> Iterator[DirtyRound]:
    with Region.anonymous(PAGE) as region, DirtyTracker(region) as tracker:
        yield tracker.collect()


def _drop_reader() -> Iterator[DropReader]:
    with Userfaultfd() as uffd, contextlib.closing(DropReader(uffd.fileno())) as reader:
        yield reader


def _restore() -> Iterator[Restore]:
    with tempfile.TemporaryDirectory() as folder:
        path = _images.write(Path(folder, "one"), [(_images.START, [_images.data(4)])])
        with (
            Snapshot.open(path) as snapshot,
            Region.anonymous(4 * PAGE) as region,
            snapshot.restore({_images.START: region}, mode="copy", paused=True) as restore,
        ):
            yield restore


def _image() -> Iterator[Snapshot]:
    with tempfile.TemporaryDirectory() as folder:
        for process in _target():
            Snapshot.take(process, f"{folder}/one", method="stopped", durable=False)
        with Snapshot.open(f"{folder}/one") as snapshot:
            yield snapshot


def _files() -> Iterator[Image]:
    for snapshot in _image():
        yield snapshot._image


def _new_file() -> Iterator[NewFile]:
    with tempfile.TemporaryDirectory() as folder, NewFile(f"{folder}/core") as file:
        yield file


def _saver() -> Iterator[Saver]:
    with Userfaultfd() as uffd, Pagemap() as pagemap, tempfile.TemporaryFile() as file:
        saver = Saver(
            pid=os.getpid(),
            uffd=uffd.fileno(),
            pagemap_fd=pagemap.fileno(),
            mem_fd=-1,
            fd=file.fileno(),
            memory_pages=16,
            max_stall_ns=10**9,
            rate=0,
        )
        with contextlib.closing(saver):
            yield saver


def _remote_pages() -> Iterator[RemotePages]:
    ours, theirs = socket.socketpair()
    with RemotePages(ours) as pages, theirs:
        yield pages


def _broker() -> Iterator[PageBroker]:
    for pages in _remote_pages():
        with PageBroker(pages) as broker:
            yield broker


def _made(generate: Callable[[], Iterator[object]]) -> Callable[[], Made]:
    return contextlib.contextmanager(generate)


MAKERS: dict[type[SoleOwner], Callable[[], Made]] = {
    Userfaultfd: Userfaultfd,
    Region: lambda: Region.memfd(PAGE),
    LazyRegion: lambda: lazy(b"x"),
    Handler: _made(_handler),
    Hold: _made(_hold),
    Pagemap: Pagemap,
    Process: lambda: Process(os.getpid()),
    Stop: _made(_stop),
    StoppedThreads: _made(_stopped_threads),
    Snapshot: _made(_image),
    Restore: _made(_restore),
    Image: _made(_files),
    NewFile: _made(_new_file),
    Saver: _made(_saver),
    RemotePages: _made(_remote_pages),
    PageBroker: _made(_broker),
    DirtyTracker: _made(_tracker),
    DirtyRound: _made(_round),
    DropReader: _made(_drop_reader),
    Bounce: lambda: contextlib.closing(Bounce()),
    BufferSource: lambda: contextlib.nullcontext(BufferSource(b"x")),
    FileSource: lambda: FileSource(__file__),
    Handover: _made(_handed_over),
    UnixListener: _made(_listener),
    EventIterator: _made(_events),
    Engine: _made(lambda: _engine_of("native")),
    WorkedEngine: _made(lambda: _engine_of("thread")),
    RemoteEngine: _made(lambda: _engine_of("process")),
    _memory.Agent: _made(_agent),
    _owned.Descriptor: lambda: _owned.Descriptor.open(__file__, os.O_RDONLY),
    _owned.MappedMemory: lambda: _owned.MappedMemory.map(PAGE, mmap.PROT_READ, ANONYMOUS),
    _owned.FileName: _owned.FileName,
    _owned.Received: _owned.Received,
    _owned.Messages: lambda: contextlib.closing(_owned.Messages(1)),
    FaultingChild: lambda: FaultingChild(pages=1),
    Step: _made(_step),
    GatedSource: lambda: contextlib.nullcontext(GatedSource(ZeroSource())),
    PendingChange: _made(_pending),
    Access: _made(_access),
    Child: _made(_context_child),
    Monitor: _made(_monitor),
    Context: lambda: contextlib.nullcontext(_context()),
}


def content(offset: int, length: int) -> bytes:
    return bytes([offset & 255]) * length


async def content_later(offset: int, length: int) -> bytes:
    return content(offset, length)


# Sources that are sent to the helper process of the process driver, and other values.
SENT: list[Any] = [
    ZeroSource(),
    CallableSource(content, length=8192),
    AsyncSource(content_later),
    DelayedSource(ZeroSource(), 0.5),
    FailingSource(ZeroSource(), OSError(5, "disk")),
    WrongLengthSource(ZeroSource(), 1),
    OverlaySource([(0, 8192, ZeroSource()), (5, 7, CallableSource(content))]),
    HandoverRange(PAGE, PAGE, PAGE),
]

# Bytes read from the kernel, and results of a run.
VALUES = {
    *(pyuffd.PageRanges, pyuffd.PageEntries, pyuffd.Residency, pyuffd.Mappings),
    pyuffd.StateRanges,
    pyuffd.conformance.Report,
    pyuffd.SnapshotProgress,
}
# They own a running server, and are closed in the tests of it; Closing refuses their copies.
SERVERS = {LazyPages, _Spare}


def _all_owners() -> set[type[SoleOwner]]:
    for module in pkgutil.walk_packages(pyuffd.__path__, "pyuffd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: set[type[SoleOwner]] = set()
    new = [SoleOwner]
    while new:
        new = [each for one in new for each in one.__subclasses__()]
        found.update(new)
    # Classes of the tests themselves do not count.
    return {each for each in found if each.__module__.startswith("pyuffd")}


def test_every_owner_is_tried_here() -> None:
    """A base class is tried through its subclasses."""
    owners = _all_owners()
    assert set(MAKERS) <= owners
    tried = {*MAKERS, *SERVERS}
    assert not {each for each in owners if not any(issubclass(one, each) for one in tried)}


@pytest.mark.parametrize(
    "module", [pyuffd, pyuffd.testing, pyuffd.conformance], ids=lambda module: module.__name__
)
def test_a_public_class_is_a_value_or_a_sole_owner(module: Any) -> None:
    """Every new class must be declared to be one or the other."""
    sent = {type(source) for source in SENT}
    undecided = [
        each
        for each in (getattr(module, name) for name in module.__all__)
        if inspect.isclass(each)
        and get_origin(each) is None
        and not issubclass(each, (SoleOwner, enum.Enum, BaseException, tuple))
        and not (dataclasses.is_dataclass(each) and each.__dataclass_params__.frozen)  # type: ignore[attr-defined]
        and each not in sent | {PageSource}
        and each not in VALUES
    ]
    assert not undecided


def _pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda it: pickle.dumps(it, protocol)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy-of-a-list": lambda it: copy.deepcopy([it]),
    **{f"pickle-{number}": _pickled(number) for number in range(pickle.HIGHEST_PROTOCOL + 1)},
}


def refused(name: str) -> None:
    owner = next(each for each in MAKERS if each.__name__ == name)
    with no_leaks():
        with MAKERS[owner]() as it:
            assert type(it) is owner
            for how, duplicate in COPIES.items():
                with pytest.raises(TypeError) as caught:
                    duplicate(it)
                assert owner._instead in str(caught.value), how
            gc.collect()
        del it, caught


@pytest.mark.crossing(every=3)
@needs(REMOVE)
@pytest.mark.parametrize("name", sorted(each.__name__ for each in MAKERS))
def test_refused(name: str) -> None:
    """copy, deepcopy and pickle fail, and change nothing."""
    run_child(refused, name, budget_s=30)


@pytest.mark.parametrize("source", SENT, ids=lambda source: type(source).__name__)
def test_sent(source: Any) -> None:
    """The process driver can still send its sources to the helper."""
    for duplicate in (
        copy.copy(source),
        copy.deepcopy(source),
        pickle.loads(pickle.dumps(source)),
    ):
        assert type(duplicate) is type(source)


def test_a_range_with_a_descriptor() -> None:
    """It does not own it: copies are allowed, but the number belongs to this process."""
    given = HandoverRange(PAGE, PAGE, PAGE, fd=0)
    assert copy.copy(given) == copy.deepcopy(given) == given
    with pytest.raises(TypeError):
        pickle.dumps(given)


def the_memory_stays() -> None:
    """The object still works, and so does the file that got the next descriptor."""
    uffd, region = Userfaultfd(), Region.memfd(PAGE)
    region.write(0, b"mine")
    for owner in (uffd, region):
        for duplicate in COPIES.values():
            with pytest.raises(TypeError):
                duplicate(owner)
    gc.collect()
    with open("/proc/self/status", "rb") as file:
        assert region.read(0, 4) == b"mine"
        region.close()
        uffd.close()
        assert file.read(4) == b"Name"


@needs(ALWAYS)
def test_the_memory_stays() -> None:
    run_child(the_memory_stays)


def _in_a_process(given: Any) -> None:
    given.write(0, b"theirs")


def by_multiprocessing(method: str) -> None:
    """A Region cannot be sent to another process, but a fork inherits it."""
    with Region.memfd(PAGE) as region:
        process = multiprocessing.get_context(method).Process(target=_in_a_process, args=(region,))  # type: ignore[attr-defined]
        if method == "fork":
            assert threading.active_count() == 1
            process.start()
            process.join()
            assert process.exitcode == 0
            assert region.read(0, 6) == b"theirs"
        else:
            with pytest.raises(TypeError):
                process.start()
            process.close()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str) -> None:
    run_child(by_multiprocessing, method, budget_s=30)
