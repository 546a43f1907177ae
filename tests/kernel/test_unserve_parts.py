"""Handler.unserve of parts: they go, the rest stays served; they may be served from elsewhere."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from pyuffd import (
    PROMISED,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    PagePoisonedError,
    PageState,
    Promised,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
    _memory,
)
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import kill, needs
from pyuffd.testing._need import needs_privilege
from tests._child import run_child
from tests._memory import memory_params
from tests.kernel._serving import run_threads, states, wait_until
from tests.kernel._verbs import (
    ABSENT,
    CLEAN,
    DIRTY,
    DRIVERS,
    MISSING,
    NEEDED,
    PAGES,
    PYTHON,
    REMOVED,
    SAVED,
    TRACKING,
    WP,
    Case,
    Driver,
    filling,
    handling,
    run_cases,
)

BOTH = MISSING | WP
SECONDS = 0.1
POISONED = PageState.POISONED
TOUCHED = PageState.IN_FLIGHT  # stands for REMOVED, and touched since


@contextmanager
def files(name: str, *firsts: bytes) -> Iterator[list[FileSource]]:
    """A file of four pages for each first byte, as a source; each page begins with its number."""
    size = 2 << 20 if name.startswith("hugetlb") else 4096
    with ExitStack() as stack:
        sources = []
        for first in firsts:
            fd = os.memfd_create("source")
            stack.callback(os.close, fd)
            for page in range(PAGES):
                os.pwrite(fd, b"%s%d" % (first, page), page * size)
            os.ftruncate(fd, PAGES * size)
            sources.append(stack.enter_context(FileSource(fd)))
        yield sources


def again(handler: Handler, part: Region, source: FileSource, mode: RegisterMode = MISSING) -> None:
    """Serve a part again, with all of it from the source."""
    if part.shared or not part.fd or part.page_size > 4096:
        handler.serve(part, source, mode=mode, present="drop")
        return
    with Region.file(part.fd, part.length, offset=part.offset) as file:
        file.punch_hole()  # reads of what is not served have filled it
    part.madvise(mmap.MADV_DONTNEED)  # its copies
    handler.serve(part, source, mode=mode)


def hides_poison(handler: Handler, region: Region) -> bool:
    """The page table does not show some poison, which is then a SIGBUS like others to the driver.

    That of huge pages; and that of private memory to users whom it shows no swap entries, of which
    the mark is one.
    """
    is_hidden = region.page_size > 4096 or (
        not region.shared and bool(needs_privilege("CAP_SYS_ADMIN").missing()[0])
    )
    return handler.driver == "inline" and is_hidden


def heads(region: Region) -> list[bytes | None]:
    """The first two bytes of each page; None where it is poisoned."""
    found: list[bytes | None] = []
    for at in range(0, region.length, region.page_size):
        try:
            found.append(region.read(at, 2))
        except PagePoisonedError:
            found.append(None)
    return found


def the_middle(handler: Handler, name: str) -> None:
    """What was there stays, what was not is poisoned, and the rest is served as before."""
    with (
        files(name, b"a", b"b") as (a, b),
        filling(handler, name, a, BOTH) as region,
    ):
        size = region.page_size
        region.read(0, 1)
        region.write(size, b"A")
        middle = region[size : 3 * size]
        handler.unserve(middle)
        assert states(handler, region[:size]) == [CLEAN]
        assert states(handler, region[3 * size :]) == [ABSENT]
        assert heads(region) == [b"a0", b"A1", None, b"a3"]
        region.write(size, b"w")  # nothing protects it any more
        for unserved in (region, middle, region[: 2 * size]):
            with pytest.raises(ValueError, match="is served"):
                handler.page_states(unserved)
        with pytest.raises(ValueError, match="no range"):
            handler.unserve(middle)
        handler.uffd.register(middle, mode=MISSING)  # it is nobody's
        handler.uffd.unregister(middle)
        # From another source, all of it.
        again(handler, middle, b, BOTH)
        assert states(handler, middle) == [ABSENT] * 2
        assert heads(region) == [b"a0", b"b0", b"b1", b"a3"]
        with pytest.raises(ValueError, match="not all of"):
            handler.page_states(region)
        handler.unserve(region)
        assert heads(region) == [b"a0", b"b0", b"b1", b"a3"]
        assert not handler._served


def what_it_holds(handler: Handler, name: str) -> None:
    """Served again without `present`, a part keeps its pages and its poison."""
    with (
        files(name, b"a", b"b") as (a, b),
        filling(handler, name, a, BOTH) as region,
    ):
        size = region.page_size
        region.read(size, 1)
        handler.unserve(region, size, 2 * size)
        middle = region[size : 3 * size]
        handler.serve(middle, b, mode=BOTH)
        expected = [b"a0", b"a1", b"b1" if hides_poison(handler, region) else None, b"a3"]
        assert heads(region) == expected
        middle.close()
        assert heads(region) == expected


def both_ends(handler: Handler, name: str) -> None:
    """A range whose first part was taken out begins behind it, and is told from what is there."""
    with (
        files(name, b"a", b"b") as (a, b),
        filling(handler, name, a) as region,
    ):
        size = region.page_size
        handler.unserve(region, 0, size)
        handler.unserve(region, 3 * size)
        with pytest.raises(ValueError, match="no range"):
            handler.page_states(region[:size])
        # A call that fails there takes nothing out of the rest.
        with pytest.raises(ValueError):
            handler.serve(region[:size], region[size : 2 * size])
        again(handler, region[:size], b)
        assert heads(region) == [b"b0", b"a1", b"a2", None]
        assert states(handler, region[:size]) == [CLEAN]
        assert states(handler, region[size : 3 * size]) == [CLEAN] * 2
        assert handler.populate(region[size : 3 * size]) == 0
        # By the address where it begins: only that one.
        handler.unserve(region.start)
        assert states(handler, region[size : 3 * size]) == [CLEAN] * 2
        # Where the first part was, another one may be served and given up.
        handler.serve(region[:size], b)
        handler.unserve(region[: 2 * size])
        assert states(handler, region[2 * size : 3 * size]) == [CLEAN]


def every_state(handler: Handler, name: str) -> None:
    """A page of each state, in the part that goes and in the one that stays."""
    inline = handler.driver == "inline"
    with files(name, b"a") as (a,), filling(handler, name, a, BOTH) as region:
        size = region.page_size
        for stays in (False, True):
            for state in (ABSENT, CLEAN, DIRTY, REMOVED, TOUCHED, POISONED):
                if inline and state in (REMOVED, TOUCHED):
                    continue
                if inline and state is POISONED:  # by others: the driver sees a missing page
                    continue
                handler.unserve(region)
                again(handler, region, a, BOTH)
                if state is not ABSENT and state is not POISONED:
                    region.read(size, 1)
                if state is DIRTY:
                    region.write(size, b"x")
                if state in (REMOVED, TOUCHED):
                    region.madvise(9 if region.shared else 4, size, size)
                if state == TOUCHED:
                    region.read(size, 1)
                if state is POISONED:
                    handler.uffd.poison(region.start + size, size)
                went = region[2 * size :] if stays else region[size:]
                handler.unserve(went)
                expected = {
                    ABSENT: b"a1" if stays else None,
                    DIRTY: b"x1",
                    CLEAN: b"a1",
                    POISONED: None,
                }.get(state, b"\0\0")
                assert heads(region)[:3] == [b"a0", expected, None], (state, stays)
                if expected is not None:
                    region.write(size, b"wr")
                    assert region.read(size, 2) == b"wr"


def preserved(handler: Handler, name: str) -> None:
    """Old content is saved before a part goes; SAVED pages are writable then."""
    if handler.driver == "process":
        return
    saved = bytearray(PAGES * (2 << 20 if name.startswith("hugetlb") else 4096))
    with filling(handler, name, None, WP, preserve=saved) as region:
        size = region.page_size
        handler.writeprotect(region)
        handler.preserve(region, size, size, keep_protected=True)
        assert states(handler, region) == [CLEAN, SAVED, CLEAN, CLEAN]
        handler.unserve(region, size, 2 * size)
        assert [saved[page * size] for page in range(PAGES)] == [0, 1, 1, 0]
        region.fill(2)
        assert states(handler, region[:size]) == [DIRTY]
        assert [saved[page * size] for page in range(PAGES)] == [1] * PAGES


def zeros(handler: Handler, name: str) -> None:
    """Zeros are right where a ZeroSource was: nothing is poisoned."""
    with filling(handler, name, ZeroSource(), BOTH) as region:
        size = region.page_size
        region.write(0, b"x")
        handler.unserve(region, size, size)
        assert region.read(0, 1) == b"x"
        assert region.read(size, size) == bytes(size)
        assert states(handler, region[2 * size :]) == [ABSENT] * 2


def refuses(handler: Handler, name: str) -> None:
    """Bad arguments are ValueError, and change nothing."""
    with files(name, b"a") as (a,), filling(handler, name, a) as region:
        size = region.page_size
        for offset, length in (
            (1, size),
            (0, size + 1),
            (0, 0),
            (-size, size),
            (3 * size, 2 * size),
            (4 * size, None),
            (size // 2, size),
        ):
            with pytest.raises(ValueError):
                handler.unserve(region, offset, length)
        with pytest.raises(ValueError):
            handler.unserve(region[size : 2 * size], 0, 2 * size)
        with pytest.raises(ValueError, match="no range"):
            handler.unserve(region.start + size)
        with pytest.raises(TypeError):
            handler.unserve("region")  # type: ignore[arg-type]
        region.write(0, b"new")
        # Pages that are served are not dropped by a call that is refused then.
        for part in (region[:size], region[: 2 * size], region[size:]):
            with pytest.raises(ValueError):
                handler.serve(part, a, present="drop")
        assert region.read(0, 3) == b"new"
        assert heads(region)[1:] == [b"a1", b"a2", b"a3"]
        # A region of which only a part is served.
        handler.unserve(region, size)
        for call in (handler.page_states, handler.populate):
            with pytest.raises(ValueError, match="not all of"):
                call(region)


def readers_of_the_rest(handler: Handler, name: str) -> None:
    """Threads that fault beside a part that comes and goes never notice."""
    if handler.driver == "process":
        return
    with files(name, b"a", b"b") as (a, b), filling(handler, name, a) as region:
        size = region.page_size
        until = time.monotonic() + SECONDS
        before = handler.stats()

        def read() -> None:
            while time.monotonic() < until:
                assert [region.read(page * size, 2) for page in (0, 2, 3)] == [b"a0", b"a2", b"a3"]

        def evict() -> None:
            while time.monotonic() < until:
                handler.evict(region[2 * size :], write_back=None)
                handler.evict(region[:size], write_back=None)

        def cut() -> None:
            part = region[size : 2 * size]
            while time.monotonic() < until:
                handler.unserve(part)
                again(handler, part, b)
                assert part.read(0, 2) == b"b0"

        run_threads(read, read, evict, cut)
        after = handler.stats()
        assert (after.failed, after.unserved) == (before.failed, before.unserved)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        the_middle,
        what_it_holds,
        both_ends,
        every_state,
        preserved,
        zeros,
        refuses,
        readers_of_the_rest,
    )
}


def check(name: str) -> None:
    for driver in DRIVERS:
        if driver == "process" and name not in ("anon", "hugetlb"):  # it is slow to start
            continue
        with handling(driver) as handler, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_cases(CASES, handler, name)


@pytest.mark.parametrize("name", memory_params())
@needs(NEEDED | Feature.POISON)
def test_parts(name: str) -> None:
    run_child(check, name, budget_s=60)


def beside_readers(driver: Driver) -> None:
    with handling(driver) as handler:
        readers_of_the_rest(handler, "anon")


@needs(NEEDED | Feature.POISON)
@pytest.mark.parametrize(
    "driver", [pytest.param("inline", id="pitfall.16.part-cut-beside-readers")]
)
def test_pitfalls(driver: Driver) -> None:
    run_child(beside_readers, driver)


def promises(offset: int, length: int) -> Promised:
    return PROMISED


def waiting(driver: Driver, prefetch: int) -> None:
    """Threads that wait in the part get SIGBUS; others wait on, and get what comes."""
    source = CallableSource(promises)
    with (
        handling(driver, prefetch=prefetch, stall_timeout_s=60) as handler,
        filling(handler, "anon", source) as region,
    ):
        size = region.page_size
        got: dict[int, object] = {}

        def touch(page: int) -> None:
            try:
                got[page] = region.read(page * size, 1)
            except PagePoisonedError as error:
                got[page] = type(error)

        threads = [threading.Thread(target=touch, args=(page,)) for page in (0, 1, 3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(states(handler, region)[page] for page in (0, 1, 3)), "it happens")
        handler.unserve(region, size, 2 * size)
        threads[1].join(10)
        assert got == {1: PagePoisonedError}
        assert handler.fill(region[:size], 0, b"x" * size) == size
        assert handler.fill(region[3 * size :], 0, b"y" * size) == size
        for thread in threads:
            thread.join(10)
        assert got == {0: b"x", 1: PagePoisonedError, 3: b"y"}
        handler.unserve(region)


@needs(NEEDED | Feature.POISON)
@pytest.mark.parametrize("prefetch", [0, 4 * 4096])
@pytest.mark.parametrize("driver", PYTHON)
def test_waiting_threads(driver: Driver, prefetch: int) -> None:
    run_child(waiting, driver, prefetch, budget_s=20)


def moved(name: str) -> None:
    """A part is found by its offset, wherever it was moved to."""
    features = TRACKING | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    with (
        Userfaultfd(features=features) as uffd,
        Handler(uffd) as handler,
        files(name, b"a") as (a,),
        filling(handler, name, a, holes=True) as region,
    ):
        size, length = region.page_size, 2 * region.page_size
        to = _memory.mmap(length, 0, 0x22)  # MAP_PRIVATE | MAP_ANONYMOUS
        _memory.mremap(region.start + size, length, length, 3, to)
        handler.unserve(region, 2 * size)
        assert _memory.read(to, 2) == b"a1"
        with pytest.raises(PagePoisonedError):
            _memory.read(to + size, 1)
        assert region.read(0, 2) == b"a0"
        handler.unserve(region)
        _memory.munmap(to, length)


@needs(NEEDED | Feature.EVENT_REMAP | Feature.EVENT_UNMAP | Feature.POISON)
@pytest.mark.parametrize("name", memory_params("anon", "shmem"))
def test_moved_parts(name: str) -> None:
    run_child(moved, name)


def forked(name: str) -> None:
    """A part goes in forks too, and the rest stays served there."""
    with (
        Userfaultfd(features=TRACKING | Feature.EVENT_FORK) as uffd,
        Handler(uffd) as handler,
        files(name, b"a") as (a,),
        filling(handler, name, a) as region,
    ):
        size = region.page_size
        go, went = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(go[0], 1)
            found = []
            for page in range(PAGES):
                try:
                    found.append(_memory.read(region.start + page * size, 2))
                except PagePoisonedError:
                    found.append(b"--")
            os.write(went[1], b"".join(found))
            os._exit(0)
        handler.unserve(region, size, 2 * size)
        os.write(go[1], b"x")
        assert os.read(went[0], 8) == b"a0----a3"
        assert os.waitpid(pid, 0)[1] == 0
        assert heads(region) == [b"a0", None, None, b"a3"]


@needs(NEEDED | Feature.EVENT_FORK | Feature.POISON)
@pytest.mark.parametrize("name", memory_params("anon", "shmem"))
def test_parts_of_forks(name: str) -> None:
    run_child(forked, name)


def after_a_death() -> None:
    """The next worker process serves what was left, and the other source."""
    with (
        handling("process") as handler,
        files("anon", b"a", b"b") as (a, b),
        filling(handler, "anon", a) as region,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        size = region.page_size
        handler.unserve(region, size, 2 * size)
        again(handler, region[size : 2 * size], b)
        engine = handler._engine
        assert isinstance(engine, RemoteEngine)
        kill(engine.pids()[1], number=signal.SIGKILL)
        wait_until(lambda: handler.stats().restarts == 1, "it happens")
        assert heads(region) == [b"a0", b"b0", None, b"a3"]
        handler.unserve(region[:size])
        kill(engine.pids()[1], number=signal.SIGKILL)
        wait_until(lambda: handler.stats().restarts == 2, "it happens")
        assert states(handler, region[3 * size :]) == [CLEAN]
        handler.unserve(region)


@needs(NEEDED | Feature.POISON)
def test_parts_outlive_the_worker_process() -> None:
    run_child(after_a_death, budget_s=30)
