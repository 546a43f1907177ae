"""Handler(driver="process"): sources in Python, called by a process of their own."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pyuffd import (
    AsyncSource,
    BufferSource,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    HandlerError,
    PageState,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import ROOT, run_child
from tests.process import _process_sources as sources
from tests.process._process_sources import PAGE, content

LENGTH = 16 * PAGE
NO_FEATURES = Feature(0)
# Well below the 10 s for a source that may still answer.
HUNG_STOP_S = 5.0


def serve(
    source: Any,
    *,
    features: Feature = NO_FEATURES,
    region: Region | None = None,
    **options: Any,
) -> tuple[Handler, Region]:
    """Start a handler of a region; the process ends with both."""
    uffd = Userfaultfd(features=features)
    region = region or Region.anonymous(LENGTH)
    handler = Handler(uffd, driver="process", **options)
    handler.serve(region, source)
    handler.start()
    return handler, region


def processes(handler: Handler) -> tuple[int, int]:
    engine = handler._engine
    assert isinstance(engine, RemoteEngine)
    return engine.pids()


def stopped(handler: Handler) -> HandlerError:
    """Stop a handler that has a failure to report."""
    with pytest.raises(HandlerError) as caught:
        handler.stop()
    handler.uffd.close()
    return caught.value


# Content


def function() -> None:
    handler, region = serve(CallableSource(sources.page))
    assert region.read(0, 2 * PAGE) == content(2 * PAGE)
    assert handler.stats().faults["missing"] == 2
    assert handler.stats().restarts == 0
    assert [fault.address for fault in handler.recent_faults()] == [
        region.start + PAGE,
        region.start,
    ]
    assert handler.populate(region, 4 * PAGE, 4 * PAGE) == 4 * PAGE
    states = handler.page_states(region)
    assert list(states) == [PageState.CLEAN] * 2 + [0, 0] + [PageState.CLEAN] * 4 + [0] * 8
    assert region.read() == content(LENGTH)
    assert handler.stats().faults["missing"] == 12
    handler.stop()
    assert handler.stats().faults["missing"] == 12
    handler.uffd.close()


def object_with_data() -> None:
    handler, region = serve(sources.Source(7))
    assert region.read() == content(LENGTH, 7)
    handler.stop()


def coroutine() -> None:
    handler, region = serve(AsyncSource(sources.page_later), workers=4)
    assert region.read() == content(LENGTH)
    handler.stop()


def two_regions() -> None:
    """Regions with sources of their own, and one with a source that C reads."""
    handler, first = serve(sources.Source(1))
    second, zeros = Region.anonymous(LENGTH), Region.anonymous(LENGTH)
    handler.serve(second, sources.Source(2))
    handler.serve(zeros, ZeroSource())
    assert second.read() == content(LENGTH, 2)
    assert first.read() == content(LENGTH, 1)
    assert zeros.read() == bytes(LENGTH)
    handler.unserve(second)
    assert second.read() == content(LENGTH, 2)
    second.madvise(mmap.MADV_DONTNEED)  # present pages stay, in a region that was served
    handler.serve(second, sources.Source(3))
    assert second.read(PAGE, PAGE) == content(2 * PAGE, 3)[PAGE:]
    handler.stop()


def file() -> None:
    fd = os.memfd_create("source")
    os.write(fd, b"-" + content(LENGTH))
    with FileSource(fd, 1) as source:
        handler, region = serve(source)
    os.close(fd)
    assert region.read() == content(LENGTH)
    handler.stop()


def prefetch_calls_once() -> None:
    path = str(Path.cwd() / "calls")
    handler, region = serve(sources.Noting(path), prefetch=4 * PAGE)
    region.touch(5 * PAGE, 1)
    assert region.read(4 * PAGE, 4 * PAGE) == content(8 * PAGE)[4 * PAGE :]
    assert Path(path).read_text() == f"{4 * PAGE} {4 * PAGE}\n"
    handler.stop()


def minor() -> None:
    """A source for minor faults fills the page cache from the other process."""
    with Userfaultfd(features=Feature.MINOR_SHMEM | Feature.MISSING_SHMEM) as uffd:
        region = Region.memfd(LENGTH)
        with Handler(uffd, driver="process") as handler:
            handler.serve(region, CallableSource(sources.page), mode=RegisterMode.MINOR)
            handler.start()
            assert region.read(PAGE, PAGE) == content(2 * PAGE)[PAGE:]
            with region.alias() as alias:
                assert alias.read(PAGE, PAGE) == content(2 * PAGE)[PAGE:]
                assert alias.read(0, PAGE) == bytes(PAGE)
            assert region.read() == content(LENGTH)
            with pytest.raises(ValueError, match="descriptor"):
                handler.serve(
                    Region.anonymous(PAGE),
                    CallableSource(sources.page),
                    mode=RegisterMode.MINOR,
                )


def write_protect() -> None:
    handler, _ = serve(ZeroSource())
    protected = Region.anonymous(LENGTH)
    protected.fill(1)
    handler.serve(protected, None, mode=RegisterMode.WP)
    handler.writeprotect(protected)
    with protected.memoryview() as view:
        view[PAGE] = 2
    assert list(handler.page_states(protected, 0, 2 * PAGE)) == [PageState.CLEAN, PageState.DIRTY]
    with pytest.raises(ValueError, match="preserve"):
        handler.serve(Region.anonymous(PAGE), None, mode=RegisterMode.WP, preserve=bytearray(PAGE))
    handler.stop()


def workers_in_parallel() -> None:
    handler, region = serve(CallableSource(sources.slow), workers=8)
    threads = [threading.Thread(target=region.touch, args=(index * PAGE, 1)) for index in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 8 * 0.25
    assert region.read(0, 8 * PAGE) == content(8 * PAGE)
    handler.stop()


@pytest.mark.parametrize(
    "check",
    [
        function,
        object_with_data,
        coroutine,
        two_regions,
        file,
        prefetch_calls_once,
        write_protect,
        workers_in_parallel,
    ],
    ids=lambda check: check.__name__,
)
def test_content(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_child(check)


@needs(Feature.MINOR_SHMEM)
def test_minor_faults() -> None:
    run_child(minor)


# The driver


def test_auto_takes_it_for_a_source_in_python() -> None:
    run_child(auto)


def auto() -> None:
    with Userfaultfd() as uffd, Region.anonymous(LENGTH) as region:
        with Handler(uffd) as handler:
            drivers = [str(handler.driver)]
            handler.serve(region, CallableSource(sources.page))
            drivers.append(handler.driver)
            assert drivers == ["native", "process"]
            handler.start()
            assert region.read() == content(LENGTH)
        with Handler(uffd) as handler, Region.anonymous(LENGTH) as other:
            handler.serve(region, ZeroSource())
            handler.start()
            with pytest.raises(ValueError, match="driver='process'"):
                handler.serve(other, CallableSource(sources.page))
            assert handler.driver == "native"
        handler = Handler(uffd, driver="native")
        with handler, pytest.raises(ValueError, match="driver='process'"):
            handler.serve(region, CallableSource(sources.page))


def beside_a_registered_range() -> None:
    """Starting the helper sends no EVENT_FORK, since no thread would read it yet."""
    with (
        Userfaultfd(features=Feature.EVENT_FORK) as uffd,
        Region.anonymous(LENGTH) as registered,
        Region.anonymous(LENGTH) as region,
    ):
        uffd.register(registered)
        with Handler(uffd, driver="process") as handler:
            handler.serve(region, CallableSource(sources.page))
            handler.start()
            assert region.read() == content(LENGTH)
            assert handler.stats().forks == 0
        uffd.unregister(registered)


@needs(Feature.EVENT_FORK)
def test_starts_without_a_fork() -> None:
    run_child(beside_a_registered_range)


def refusals() -> None:
    handler, region = serve(ZeroSource())
    other = Region.anonymous(LENGTH)
    for source in (
        sources.Source(threading.Lock()),  # type: ignore[arg-type]
        BufferSource(bytes(LENGTH)),
        sources.Source(BufferSource(bytes(LENGTH))),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="process"):
            handler.serve(other, source)
    assert region.read() == bytes(LENGTH)
    handler.serve(other, CallableSource(sources.page))
    assert other.read() == content(LENGTH)
    handler.stop()


def test_what_cannot_be_sent_is_refused() -> None:
    run_child(refusals)


# Failures of a source


def failing(name: str, cause: str) -> None:
    handler, region = serve(CallableSource(getattr(sources, name)))
    pipe = os.pipe()
    with region.memoryview() as view, pytest.raises(OSError) as caught:
        os.write(pipe[1], view[3 * PAGE : 3 * PAGE + 1])
    assert caught.value.errno == errno.EFAULT
    raised = stopped(handler)
    assert raised.start == region.start + 3 * PAGE
    assert type(raised.__cause__).__name__ == cause
    notes = getattr(raised.__cause__, "__notes__", [])
    assert any("in the helper process" in note for note in notes)
    assert handler.stats().poisoned_pages == LENGTH // PAGE


@needs_kernel_faults()
@needs(Feature.POISON)
@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("broken", "LookupError"),
        ("refused", "PermissionError"),
        ("short", "HandlerError"),
        ("stubborn", "RuntimeError"),
    ],
)
def test_failing_source(name: str, cause: str) -> None:
    run_child(failing, name, cause)


def timing_out() -> None:
    handler, region = serve(CallableSource(sources.hanging), stall_timeout_s=0.2)
    pipe = os.pipe()
    with region.memoryview() as view, pytest.raises(OSError) as caught:
        os.write(pipe[1], view[:1])
    assert caught.value.errno == errno.EFAULT
    began = time.monotonic()
    raised = stopped(handler)
    assert time.monotonic() - began < HUNG_STOP_S
    assert raised.start == region.start
    assert "in time" in str(raised)


@needs_kernel_faults()
@needs(Feature.POISON)
def test_source_that_takes_too_long() -> None:
    result = run_child(timing_out, budget_s=30)
    assert "hanging" in result.stderr  # its traceback


# The interpreter's lock is held, which does no harm

ACTIONS: dict[str, Any] = {}


def _memoryview(region: Region) -> None:
    with region.memoryview() as view:
        assert view[PAGE] == content(2 * PAGE)[PAGE]
        assert bytes(view[5 * PAGE - 1 : 5 * PAGE + 1]) == content(LENGTH)[5 * PAGE - 1 :][:2]


def _numpy(region: Region) -> None:
    numpy = pytest.importorskip("numpy")
    assert numpy.asarray(region).sum(dtype=numpy.uint64) == sum(content(LENGTH))


def _ffi(region: Region) -> None:
    from cffi import FFI

    ffi = FFI()
    target = bytearray(PAGE)
    ffi.memmove(target, ffi.cast("char *", region.start + PAGE), PAGE)
    assert target == content(2 * PAGE)[PAGE:]


def _madvise(region: Region) -> None:
    """The mmap module holds the lock while the event waits to be read."""
    assert region.read(0, PAGE) == content(PAGE)
    libc = ctypes.PyDLL(None, use_errno=True)  # a PyDLL call holds the lock too
    address = ctypes.c_void_p(region.start)
    assert libc.madvise(address, ctypes.c_size_t(PAGE), mmap.MADV_DONTNEED) == 0
    assert region.read(0, PAGE) == bytes(PAGE)


def _fork(region: Region) -> None:
    with region.memoryview() as view:
        child = os.fork()
        if child == 0:
            os._exit(0 if view[2 * PAGE] == content(3 * PAGE)[2 * PAGE] else 1)
        assert view[2 * PAGE] == content(3 * PAGE)[2 * PAGE]
        assert os.waitpid(child, 0)[1] == 0


def _preexec(region: Region) -> None:
    with region.memoryview() as view:
        done = subprocess.run(
            [sys.executable, "-c", ""], preexec_fn=lambda: view[3 * PAGE], check=False
        )
        assert done.returncode == 0
        assert view[3 * PAGE] == content(4 * PAGE)[3 * PAGE]


HOLDING = {
    "memoryview": (_memoryview, Feature(0)),
    "numpy": (_numpy, Feature(0)),
    "ffi": (_ffi, Feature(0)),
    "madvise": (_madvise, Feature.EVENT_REMOVE),
    "fork": (_fork, Feature.EVENT_FORK),
    "preexec": (_preexec, Feature.EVENT_FORK),
}


def holding_the_lock(name: str) -> None:
    action, features = HOLDING[name]
    handler, region = serve(CallableSource(sources.page), features=features)
    action(region)
    handler.stop()
    handler.uffd.close()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs(features) if features else ())
        for name, (_, features) in HOLDING.items()
    ],
)
def test_holding_the_interpreter_lock(name: str) -> None:
    run_child(holding_the_lock, name)


# Ends


def run_until_it_ends(how: str, pipe: int) -> None:
    """Print the pids of the helper processes, and end as told."""
    handler, region = serve(CallableSource(sources.page))
    assert region.read(0, 1) == content(PAGE)[:1]
    os.write(pipe, json.dumps(processes(handler)).encode())
    os.close(pipe)
    if how == "exec":
        os.execv(sys.executable, [sys.executable, "-c", ""])
    if how == "fork":
        # The child has our end of the socket, and outlives us for a while.
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    if how == "sys.exit":
        sys.exit()
    if how == "os._exit":
        os._exit(0)
    if how == "exception":
        raise LookupError
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])


def gone(pid: int, limit_s: float = 10.0) -> bool:
    """Wait for the end of a process that is not our child."""
    give_up = time.monotonic() + limit_s
    while time.monotonic() < give_up:
        try:
            if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.crossing(every=2)
@needs_kernel_faults()
@pytest.mark.parametrize(
    "how",
    ["return", "sys.exit", "os._exit", "exception", "SIGTERM", "SIGKILL", "SIGINT", "exec", "fork"],
)
def test_no_process_is_left(how: str) -> None:
    read, write = os.pipe()
    program = (
        "from tests.process.test_process_driver import run_until_it_ends;"
        f" run_until_it_ends({how!r}, {write})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        try:
            os.close(write)
            with open(read, "rb") as pipe:
                keeper, worker = json.loads(pipe.read())
            assert keeper != worker
            child.wait(20)
            assert gone(worker)
            assert gone(keeper)
        finally:
            os.killpg(child.pid, signal.SIGKILL) if how == "fork" else child.kill()


def leaks() -> None:
    handler, region = serve(CallableSource(sources.page))
    pids = processes(handler)
    handler.stop()
    assert gone(pids[0], 1.0)
    assert gone(pids[1], 1.0)
    handler.uffd.close()
    region.close()
    fds, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        handler, region = serve(CallableSource(sources.page))
        helper_fds = len(os.listdir(f"/proc/{processes(handler)[0]}/fd"))
        for _ in range(10):
            with Region.anonymous(PAGE) as other:
                handler.serve(other, CallableSource(sources.page))
                assert other.read() == content(PAGE)
        assert len(os.listdir(f"/proc/{processes(handler)[0]}/fd")) == helper_fds
        handler.stop()
        handler.uffd.close()
        region.close()
    assert set(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads


def test_nothing_leaks() -> None:
    run_child(leaks, budget_s=20)


def used_in_a_fork() -> None:
    handler, region = serve(CallableSource(sources.page))
    child = os.fork()
    if child == 0:
        try:
            handler.stats()
        except ValueError:
            handler.stop()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert region.read() == content(LENGTH)
    handler.stop()


def test_a_fork_leaves_it_alone() -> None:
    run_child(used_in_a_fork)
