"""Pages that are present before serve(): refused, kept or dropped."""

from __future__ import annotations

import ctypes
import os
import pathlib
import random
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    PageSource,
    PageState,
    RangeBusyError,
    Region,
    RegisterMode,
    UffdError,
    UffdOSError,
    Userfaultfd,
    ZeroSource,
)
from pyuffd.handlers._present import Present
from pyuffd.testing import MEMORY_TYPES, needs, needs_privilege
from pyuffd.testing._opening import only_user_mode
from tests._child import run_child
from tests._memory import PAGE, memory_params
from tests.kernel._serving import (
    Driver,
    content,
    everywhere,
    handler_of,
    is_lost,
    serving,
    states,
    with_both_drivers,
)

ABSENT, CLEAN, DIRTY = PageState.ABSENT, PageState.CLEAN, PageState.DIRTY
POISONED = PageState.POISONED
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
TRACKING = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
MINOR_FAULTS = Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS
MCL_FUTURE = 2
ROUNDS = 60


def refused(driver: Driver, name: str) -> None:
    """ValueError before any change: it tells how many, the first one, and what to do."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(4)
        size = memory.page_size
        region.write(2 * size, b"there")
        for source in (BufferSource(content(region.length)), ZeroSource()):
            with pytest.raises(ValueError, match=rf"1 page .*{region.start + 2 * size:#x}.*drop"):
                handler.serve(region, source)
        assert not handler.uffd._has_registered(region.start, region.start + region.length)
        assert region.read(2 * size, 5) == b"there"


test_refused = everywhere(refused)


def kept(driver: Driver, name: str) -> None:
    """Present pages stay; the others come from the source."""
    for mode in (MISSING, MISSING | WP):
        with serving(driver, name, TRACKING) as (handler, memory):
            region = memory.pages(3)
            size, data = memory.page_size, content(region.length)
            region.write(size, b"there")
            handler.serve(region, BufferSource(data), mode=mode, present="keep")
            handler.start()
            there = DIRTY if mode & WP else CLEAN
            assert states(handler, region) == [ABSENT, there, ABSENT]
            assert handler.populate(region) == 2 * size
            assert states(handler, region) == [CLEAN, there, CLEAN]
            assert region.read(size, 6) == b"there\0"
            assert region.read(2 * size, size) == data[2 * size :]


test_kept = everywhere(kept)


def kept_if_adopted(present: Present | None) -> None:
    """An earlier handler of an adopted userfaultfd may have filled them."""
    with (
        Region.anonymous(2 * PAGE) as region,
        Userfaultfd() as owner,
        Userfaultfd.from_fd(os.dup(owner.fileno()), owner_pid=os.getpid()) as uffd,
        Handler(uffd) as handler,
    ):
        region.write(0, b"there")
        handler.serve(region, BufferSource(b"s" * region.length), present=present)
        assert region.read(0, 5) == b"there"
        assert region.read(PAGE, 1) == b"s"


@pytest.mark.parametrize("present", [None, "keep", "refuse"])
def test_kept_if_adopted(present: Present | None) -> None:
    run_child(kept_if_adopted, present)


def dropped(driver: Driver, name: str) -> None:
    """All pages come from the source."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        data = content(region.length)
        region.fill(1)
        handler.serve(region, BufferSource(data), present="drop")
        handler.start()
        assert states(handler, region) == [ABSENT] * 3
        assert region.read() == data


test_dropped = everywhere(dropped, "anon", "shmem", "hugetlb", "hugetlb-private")


def drops_nothing_in_vain(driver: str, started: bool) -> None:
    """What cannot be served in the end keeps its content: files, and memory of others."""
    features = Feature.SIGBUS if driver == "inline" else Feature.EVENT_REMOVE
    lacking: dict[str, Any] = {"mode": MISSING | RegisterMode.MINOR}
    with (
        tempfile.NamedTemporaryFile(dir=pathlib.Path(__file__).parent) as file,
        Userfaultfd(features=features) as uffd,
        Userfaultfd(features=Feature.EVENT_REMOVE) as other,
        Handler(uffd, driver=driver, autostart=started) as handler,  # type: ignore[arg-type]
    ):
        file.write(bytes([1]) * 3 * PAGE)
        file.flush()
        shared, private = Region.memfd(3 * PAGE), Region.anonymous(3 * PAGE)
        ordinary, here = Region.file(file.name), Region.memfd(3 * PAGE)
        anonymous = Region.anonymous(3 * PAGE)
        for region in (shared, private, here, anonymous):
            region.fill(1)
        for region in (shared, private):
            other.register(region, mode=MISSING)
        rows: list[tuple[Region, type[Exception], dict[str, Any]]] = [
            (shared, RangeBusyError, {}),
            (private, RangeBusyError, {}),
            (anonymous, UffdOSError, lacking),
            (ordinary, UffdOSError, {}),
            (Region.at(ordinary.start, ordinary.length), UffdOSError, {}),
        ]
        for region, error, arguments in rows:
            source = CallableSource(partial(same, 2)) if driver == "process" else b"2" * 3 * PAGE
            with pytest.raises(error):
                handler.serve(region, source, present="drop", **arguments)
            assert region.read() == bytes([1]) * region.length
            assert not uffd._has_registered(region.start, region.start + region.length)
        assert other.read_events() == []
        # Nor is it recommended to drop an ordinary file.
        for region in (ordinary, Region.at(ordinary.start, ordinary.length)):
            for _ in range(2):
                with pytest.raises(UffdOSError, match="an ordinary file"):
                    handler.serve(region, source)
                region.touch()
        handler.serve(here, source, present="drop")
        if started:
            assert here.read(PAGE, 1) in (b"2", bytes([2]))


@pytest.mark.parametrize("started", [True, False], ids=["started", "not-started"])
@pytest.mark.parametrize("driver", ["native", "inline", "thread", "process"])
def test_drops_nothing_in_vain(driver: str, started: bool) -> None:
    run_child(drops_nothing_in_vain, driver, started)


def same(value: int, _offset: int, length: int) -> bytes:
    """Return the content of a source for the helper process."""
    return bytes([value]) * length


def read_meanwhile(driver: str, name: str) -> None:
    """A thread that touches a page between its drop and its registration makes no zeros of it."""
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with (
        Userfaultfd(features=features) as uffd,
        MEMORY_TYPES[name].make(8 * MEMORY_TYPES[name].page_size) as region,
        Handler(uffd, driver=driver) as handler,  # type: ignore[arg-type]
    ):
        size = region.page_size
        half = region[4 * size :]

        def source(value: int) -> PageSource:
            if driver == "process":
                return CallableSource(partial(same, value))
            return BufferSource(bytes([value]) * region.length)

        handler.serve(region, source(255))
        handler.populate(region)
        ends = threading.Event()

        def touch() -> None:
            while not ends.is_set():
                with suppress(UffdError):  # poisoned, or not served just now
                    region.read(5 * size, 1)

        reader = threading.Thread(target=touch)
        reader.start()
        try:
            for number in range(ROUNDS // 3 if driver == "process" else ROUNDS):
                handler.unserve(half)
                handler.serve(half, source(1 + number), present="drop")
                assert region.read(5 * size, 1) == bytes([1 + number])
        finally:
            ends.set()
            reader.join()


@pytest.mark.parametrize("driver", ["native", "inline", "process"])
@pytest.mark.parametrize("name", memory_params("anon", "shmem", "hugetlb-private"))
def test_dropped_while_others_read(driver: str, name: str) -> None:
    run_child(read_meanwhile, driver, name)


def poison_is_kept(driver: Driver) -> None:
    """A thread that touches a poisoned page at any time gets no content of the next source."""
    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    with (
        Userfaultfd(features=features) as uffd,
        Region.anonymous(4 * PAGE) as region,
        Handler(uffd, driver=driver) as handler,
    ):
        handler.serve(region, BufferSource(b"a" * region.length))
        part = region[PAGE : 2 * PAGE]
        handler.unserve(part)
        found: set[str] = set()
        ends = threading.Event()

        def touch() -> None:
            while not ends.is_set():
                try:
                    found.add(repr(region.read(PAGE, 1)))
                except UffdError as error:
                    found.add(type(error).__name__)

        reader = threading.Thread(target=touch)
        reader.start()
        try:
            for _ in range(ROUNDS):
                handler.serve(part, BufferSource(b"b" * PAGE), present="keep")
                handler.unserve(part)
        finally:
            ends.set()
            reader.join()
        assert not {one for one in found if one.startswith("b'")}, found
        assert is_lost(region, PAGE, 1)


@needs_privilege("CAP_SYS_ADMIN")  # to see poison marks
@pytest.mark.parametrize("driver", ["native", "inline"])
def test_poison_is_kept_while_others_read(driver: Driver) -> None:
    run_child(poison_is_kept, driver)


def comes_back(driver: Driver, name: str) -> None:
    """A private file mapping shows the page cache again, which the first write filled."""
    with serving(driver, name) as (handler, memory):
        region = memory.pages(3)
        region.fill(1)
        with pytest.raises(ValueError, match="page cache"):
            handler.serve(region, BufferSource(content(region.length)), present="drop")
        assert region.read(0, 1) == b"\1"


test_cannot_be_dropped = everywhere(comes_back, "shmem-private")


def after_a_handler(driver: Driver, name: str) -> None:
    """Content and poison of an earlier handler are kept."""
    with serving(driver, name) as (first, memory):
        region = memory.pages(3)
        size, data = memory.page_size, content(region.length)
        first.serve(region, BufferSource(data))
        first.start()
        region.touch(size, size)
        first.stop()
        with handler_of(driver) as second:
            second.serve(region, BufferSource(data))
            second.start()
            assert states(second, region)[1] == CLEAN
            assert region.read(size, size) == data[size : 2 * size]
            # Without CAP_SYS_ADMIN private poison is invisible: the inline driver fills that page.
            if driver != "inline" or name != "anon" or not only_user_mode():
                assert is_lost(region, 0, size)
        with handler_of(driver) as third:
            third.serve(region, BufferSource(data), present="drop")
            third.start()
            assert region.read() == data


test_served_again = everywhere(after_a_handler, "anon", "shmem")


def locked() -> None:
    """mlockall(MCL_FUTURE) fills new mappings: refused, and dropped on request."""
    assert ctypes.CDLL(None).mlockall(MCL_FUTURE) == 0
    with Userfaultfd() as uffd, Region.anonymous(4 * PAGE) as region, Handler(uffd) as handler:
        data = content(region.length)
        with pytest.raises(ValueError, match="4 pages"):
            handler.serve(region, BufferSource(data))
        handler.serve(region, BufferSource(data), present="drop")
        handler.start()
        assert region.read() == data


@needs_privilege("CAP_IPC_LOCK")
def test_locked_memory() -> None:
    run_child(locked)


def misused(driver: Driver) -> None:
    with serving(driver, "anon", TRACKING) as (handler, memory):
        region = memory.pages(1)
        bad: list[dict[str, Any]] = [
            {"source": ZeroSource(), "present": "replace"},
            {"source": None, "mode": WP, "present": "drop"},
        ]
        for arguments in bad:
            with pytest.raises(ValueError, match="present"):
                handler.serve(region, **arguments)
        region.fill(1)
        handler.serve(region, None, mode=WP)  # there is nothing to fetch


test_misused = with_both_drivers(misused)


def many() -> None:
    """The check is cheap: serving many small regions needs about as long as without it."""
    with Userfaultfd() as uffd, Handler(uffd) as handler:
        regions = [Region.anonymous(PAGE) for _ in range(500)]
        began = time.thread_time()
        for region in regions:
            handler.serve(region, ZeroSource())
        kept_s = time.thread_time() - began
        assert kept_s < 2.0, kept_s
        handler.stop()
        for region in regions:
            region.close()


def test_many_regions() -> None:
    run_child(many)


def put_there_by_an_alias(region: Region) -> None:
    assert region.fd is not None
    with Region.file(region.fd, region.length) as alias:
        alias.write(region.page_size, b"there")


def put_there_by_a_call(region: Region) -> None:
    """Zeros, of which only the number of blocks tells."""
    assert region.fd is not None
    os.posix_fallocate(region.fd, region.page_size, region.page_size)


def only_in_the_cache(driver: Driver, name: str) -> None:
    """A page that this mapping does not map: Linux maps what the page cache has, and no fault."""
    for put_there in (put_there_by_an_alias, put_there_by_a_call):
        with serving(driver, name, MINOR_FAULTS) as (handler, memory):
            region = memory.pages(3)
            size, data = memory.page_size, content(region.length)
            put_there(region)
            with pytest.raises(ValueError, match=r"the file of .* exist already"):
                handler.serve(region, BufferSource(data))
            if region.shared:
                handler.serve(region, BufferSource(data), present="drop")
                handler.start()
                assert region.read() == data
                handler.unserve(region)
            else:
                handler.serve(region, BufferSource(data), present="keep")
                handler.start()
                assert region.read(2 * size) == data[2 * size :]


test_only_in_the_cache = everywhere(
    only_in_the_cache, "shmem", "shmem-private", "hugetlb", "hugetlb-private"
)


def parts_of_a_file(driver: Driver, name: str) -> None:
    """Only the pages of the range itself count, and none where they cause minor faults."""
    with serving(driver, name, MINOR_FAULTS) as (handler, memory):
        region = memory.pages(4)
        size, data = memory.page_size, content(region.length)
        handler.start()
        handler.serve(region[: 2 * size], BufferSource(data))
        handler.populate(region[: 2 * size])
        handler.serve(region[2 * size :], BufferSource(data[2 * size :]))
        assert region.read() == data
    with serving(driver, name, MINOR_FAULTS) as (handler, memory):
        region = memory.pages(2)
        put_there_by_an_alias(region)
        mode = MISSING | RegisterMode.MINOR
        handler.serve(region, BufferSource(content(region.length)), mode=mode)
        handler.start()
        assert region.read(size, 5) == b"there"


test_parts_of_a_file = everywhere(parts_of_a_file, "shmem", "hugetlb")


def mapped_by_others(driver: Driver, name: str) -> None:
    """Region.at has no descriptor; the mapping tells of its file."""
    with serving(driver, name, MINOR_FAULTS) as (handler, memory):
        region = memory.pages(3)
        there = Region.at(region.start, region.length)
        size, data = memory.page_size, content(region.length)
        put_there_by_an_alias(region)
        with pytest.raises(ValueError, match=r"the file of .* exist already"):
            handler.serve(there, BufferSource(data))
        if region.shared:
            handler.serve(there[2 * size :], BufferSource(data[2 * size :]))
            handler.unserve(there[2 * size :])
            handler.serve(there, BufferSource(data), present="drop")
            handler.start()
            assert region.read() == data
        else:
            with pytest.raises(ValueError, match="page cache"):
                handler.serve(there, BufferSource(data), present="drop")


test_mapped_by_others = everywhere(mapped_by_others, "shmem", "shmem-private", drivers=("native",))


def anonymous_mapped_by_others(driver: Driver, name: str) -> None:
    """Linux shows a file for huge pages that have none."""
    with serving(driver, name, TRACKING) as (handler, memory):
        length = 2 * memory.page_size
        huge = memory.page_size if memory.is_hugetlb else None
        with Region.anonymous(length, huge_page_size=huge) as region:
            there = Region.at(region.start, length)
            mode = MISSING | WP
            handler.serve(there, BufferSource(content(length)), mode=mode)
            handler.start()
            region.write(0, b"new")
            assert handler.evict(there, write_back=None) == memory.page_size
            assert region.read() == content(length)


test_anonymous_mapped_by_others = everywhere(
    anonymous_mapped_by_others, "anon", "hugetlb-private", drivers=("native",)
)


def many_at_once() -> None:
    """They are looked at through one descriptor; the one that has a page is refused."""

    def opened() -> int:
        folder = "/proc/self/fd"
        return sum(
            os.path.exists(f"{folder}/{fd}") and os.readlink(f"{folder}/{fd}").endswith("/pagemap")
            for fd in os.listdir(folder)
        )

    with (
        Userfaultfd() as uffd,
        Region.anonymous(PAGE) as first,
        Region.anonymous(PAGE) as second,
        Region.anonymous(PAGE) as third,
        Handler(uffd) as handler,
    ):
        second.write(0, b"there")
        before = opened()  # its engine has one
        with handler._serving_many():
            with handler._serving_many():  # as another thread would
                handler.serve(first, b"first".ljust(PAGE))
            assert opened() == before + 1
            with pytest.raises(ValueError, match="1 page "):
                handler.serve(second, b"second".ljust(PAGE))
        assert opened() == before
        assert not uffd._has_registered(second.start, second.start + PAGE)
        handler.serve(third, b"third".ljust(PAGE))
        texts = [region.read(0, 5) for region in (first, second, third)]
        assert texts == [b"first", b"there", b"third"]


def test_many_at_once() -> None:
    run_child(many_at_once)


class TwoOwners:
    """A region of which two handlers, each with a userfaultfd of its own, serve parts."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.content: dict[int, bytes] = {}  # what a page has by now
        self.source: dict[int, bytes] = {}  # what it gets when it is absent
        self.log: list[str] = []

    def check(self, region: Region, page: int) -> None:
        expected = self.content.get(page, self.source.get(page, bytes(PAGE)))
        assert region.read(page * PAGE, PAGE) == expected, (page, self.log)
        self.content[page] = expected

    def touch(self, region: Region, count: int) -> None:
        for number in range(count):
            page = self.rng.randrange(TWO_PAGES)
            if self.rng.random() < 0.5:
                self.content[page] = bytes([1 + number]) * PAGE
                region.write(page * PAGE, self.content[page])
            else:
                self.check(region, page)

    def serve(self, handler: Handler, region: Region, letter: int) -> None:
        rng = self.rng
        first = rng.randrange(TWO_PAGES)
        count = rng.randint(1, TWO_PAGES - first)
        present: Present = rng.choice(("drop", "drop", "keep", "refuse"))
        pages = {page: bytes([letter + page]) * PAGE for page in range(first, first + count)}
        data = b"".join(pages.values())
        source = BufferSource(data) if handler.driver == "native" else CallableSource(Slices(data))
        self.log.append(f"{handler.driver} {first}, {count}, {present}")
        try:
            handler.serve(region[first * PAGE : (first + count) * PAGE], source, present=present)
        except (ValueError, OSError):  # served already, or has pages: nothing has changed
            self.log.append("refused")
            return
        assert self.source.keys().isdisjoint(pages), self.log
        self.source |= pages
        if present == "drop":
            for page in pages:
                self.content.pop(page, None)

    def run(self) -> None:
        rng = self.rng
        of = MEMORY_TYPES[rng.choice(("anon", "shmem", "shmem-private"))]
        events = [rng.choice((Feature(0), Feature.EVENT_REMOVE)) for _ in range(2)]
        with (
            of.make(TWO_PAGES * PAGE) as region,
            Userfaultfd(features=events[0]) as first,
            Userfaultfd(features=events[1]) as second,
            Handler(first, driver=rng.choice(("native", "thread"))) as one,
            Handler(second) as other,
        ):
            self.touch(region, rng.randint(2, 14))
            for _ in range(rng.randint(2, 8)):
                handler = rng.choice((one, other))
                self.serve(handler, region, 0x40 if handler is one else 0x80)
                self.touch(region, rng.randint(0, 8))
            for page in range(TWO_PAGES):
                self.check(region, page)


class Slices:
    """A source in Python."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __call__(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


def two_owners(seed: int, count: int) -> None:
    for number in range(seed, seed + count):
        try:
            TwoOwners(number).run()
        except BaseException:
            print(f"seed {number}")
            raise


TWO_PAGES = 16
SEED = int(os.environ.get("PYUFFD_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


@needs(Feature.EVENT_REMOVE)
@pytest.mark.parametrize("count", [30, pytest.param(3000, marks=pytest.mark.stress)])
def test_beside_a_second_userfaultfd(count: int) -> None:
    """Dropping what is present, or not, beside parts that another handler serves."""
    run_child(two_owners, SEED, count, budget_s=30 + count)
