"""Messages of hostile and broken peers: each is a named error and leaves no descriptor open."""

from __future__ import annotations

import array
import contextlib
import os
import pickle
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from pyuffd import HandoverError, UffdError, handover, recv_uffd
from pyuffd import _handover_format as form

PAGE = 4096
HUGE = 2 << 20
START = 0x7F00_0000_0000
HEADER = struct.Struct("<8sHHII")
RANGE = struct.Struct("<QQQQII")
# For a peer that stays connected and sends nothing more.
SHORT_S = 0.05

Row = tuple[int, ...]
GOOD: Row = (START, 4 * PAGE, PAGE, 0, 0, 0)


def message(
    *rows: Row,
    magic: bytes = form.MAGIC,
    version: int = 1,
    size: int = RANGE.size,
    count: int | None = None,
    fds: int = 1,
) -> bytes:
    """Return the bytes of a message; it is valid unless an argument changes that."""
    head = HEADER.pack(magic, version, size, len(rows) if count is None else count, fds)
    return head + b"".join(RANGE.pack(*row) for row in rows)


@dataclass(frozen=True)
class Hostile:
    """What a peer sends, piece by piece, and the expected error."""

    reason: str
    pieces: tuple[tuple[bytes, int], ...]  # bytes, and the number of descriptors with them
    closes: bool = True


def says(reason: str, data: bytes, fds: int = 1, *, closes: bool = True) -> Hostile:
    return Hostile(reason, ((data, fds),), closes)


ONE = message(GOOD)
HOSTILE = {
    # The stream
    "nothing": Hostile("closed", ()),
    "nothing-and-stays": Hostile("timeout", (), closes=False),
    "half-a-header": says("closed", ONE[:10]),
    "half-a-header-and-stays": says("timeout", ONE[:10], closes=False),
    "half-a-range": says("closed", ONE[:-1]),
    "half-a-range-and-stays": says("timeout", ONE[:-1], closes=False),
    # Other protocols
    "http": says("format", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 0),
    "firecracker": says("format", b'[{"base_host_virt_addr":139637976727552,"size":4096}]'),
    "zeros": says("format", bytes(64)),
    "ones": says("format", b"\xff" * 64),
    "magic-cut": says("format", message(GOOD, magic=b"pyuffd\0\0")),
    "magic-reversed": says("format", message(GOOD, magic=form.MAGIC[::-1])),
    # The header
    "version-0": says("version", message(GOOD, version=0)),
    "version-2": says("version", message(GOOD, version=2)),
    "version-65535": says("version", message(GOOD, version=65535)),
    "range-size-0": says("version", message(GOOD, size=0)),
    "range-size-48": says("version", message(GOOD, size=48)),
    "too-many-by-one": says("too-large", message(count=handover.MAX_REGIONS + 1)),
    "1-gib": says("too-large", message(count=(1 << 30) // RANGE.size)),
    "all-the-ranges": says("too-large", message(count=0xFFFF_FFFF)),
    # Descriptors
    "none-announced": says("descriptors", message(GOOD, fds=0), 0),
    "none-announced-one-sent": says("descriptors", message(GOOD, fds=0), 1),
    "254-announced": says("descriptors", message(GOOD, fds=254), 253),
    "4-billion-announced": says("descriptors", message(GOOD, fds=0xFFFF_FFFF)),
    "none-sent": says("descriptors", ONE, 0),
    "one-too-many": says("descriptors", ONE, 2),
    "253-for-one": says("descriptors", ONE, 253),
    "one-too-few": says("descriptors", message(GOOD, fds=2), 1),
    "late": Hostile("descriptors", ((ONE[:-1], 0), (ONE[-1:], 1))),
    "more-with-the-ranges": Hostile("descriptors", ((ONE[:30], 1), (ONE[30:], 3))),
    "with-every-byte": Hostile("descriptors", tuple((bytes([byte]), 2) for byte in ONE)),
    "index-out-of-bounds": says("descriptors", message((*GOOD[:4], 1, 0))),
    "index-of-the-last-bit": says("descriptors", message((*GOOD[:4], 1 << 31, 0))),
    "unused": says("descriptors", message(GOOD, fds=2), 2),
    "not-a-userfaultfd": says("not-a-userfaultfd", ONE),
    "not-a-userfaultfd-no-ranges": says("not-a-userfaultfd", message()),
    # Ranges
    "reserved": says("format", message((*GOOD[:5], 1))),
    "start-unaligned": says("ranges", message((START + 1, PAGE, PAGE, 0, 0, 0))),
    "start-unaligned-huge": says("ranges", message((START + PAGE, HUGE, HUGE, 0, 0, 0))),
    "length-0": says("ranges", message((START, 0, PAGE, 0, 0, 0))),
    "length-unaligned": says("ranges", message((START, PAGE + 512, PAGE, 0, 0, 0))),
    "length-of-small-pages": says("ranges", message((START, PAGE, HUGE, 0, 0, 0))),
    "beyond-64-bits": says("ranges", message((-PAGE % 2**64, 2 * PAGE, PAGE, 0, 0, 0))),
    "all-of-64-bits": says("ranges", message((PAGE, -PAGE % 2**64, PAGE, 1, 0, 0))),
    "page-size-0": says("ranges", message((START, PAGE, 0, 0, 0, 0))),
    "page-size-1": says("ranges", message((START, PAGE, 1, 0, 0, 0))),
    "page-size-8192": says("ranges", message((START, 8192, 8192, 0, 0, 0))),
    "page-size-huge": says("ranges", message((0, 1 << 63, 1 << 63, 0, 0, 0))),
    "offset-beyond-any-file": says("ranges", message((START, PAGE, PAGE, (1 << 63) - 1, 0, 0))),
    "offset-of-64-bits": says("ranges", message((START, PAGE, PAGE, 2**64 - 1, 0, 0))),
    "twice": says("ranges", message(GOOD, GOOD)),
    "overlap-by-a-page": says("ranges", message(GOOD, (START + 3 * PAGE, PAGE, PAGE, 0, 0, 0))),
    "inside-out-of-order": says(
        "ranges", message((START + PAGE, PAGE, PAGE, 0, 0, 0), (START, HUGE, HUGE, 0, 0, 0))
    ),
    # Memory; here it is the end of a pipe
    "memory-is-a-pipe": says("memory", message((*GOOD[:4], 1, 0), fds=2), 2),
    "memory-offset-unaligned": says("ranges", message((START, PAGE, PAGE, 8, 1, 0), fds=2), 2),
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Check that every descriptor that a test received is closed."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    # Garbage of earlier tests may be closed meanwhile.
    assert not set(os.listdir("/proc/self/fd")) - before


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert sock.sendmsg([data], rights) == len(data)


@contextlib.contextmanager
def pipe() -> Iterator[int]:
    """The reading end of a pipe, as any descriptor."""
    reading, writing = os.pipe()
    os.close(writing)
    try:
        yield reading
    finally:
        os.close(reading)


def refused(
    sock: socket.socket, timeout_s: float = 10.0, max_regions: int = handover.MAX_REGIONS
) -> HandoverError:
    with pytest.raises(HandoverError) as caught:
        recv_uffd(sock, timeout_s=timeout_s, max_regions=max_regions)
    return caught.value


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_message(pair: tuple[socket.socket, socket.socket], name: str) -> None:
    ours, theirs = pair
    hostile = HOSTILE[name]
    with pipe() as fd:
        for data, count in hostile.pieces:
            send(theirs, data, [fd] * count)
    if hostile.closes:
        theirs.close()
    error = refused(ours, 10.0 if hostile.closes else SHORT_S)
    assert (error.reason, error.pid, error.uid) == (hostile.reason, os.getpid(), os.geteuid())


def memory_of(kind: str) -> int:
    if kind == "memfd":
        return os.memfd_create("short")
    return os.open({"directory": "/", "device": "/dev/zero"}[kind], os.O_RDONLY)


@pytest.mark.parametrize("kind", ["memfd", "directory", "device"])
def test_memory_that_is_none_or_too_short(
    pair: tuple[socket.socket, socket.socket], kind: str
) -> None:
    ours, theirs = pair
    fd = memory_of(kind)
    try:
        if kind == "memfd":
            os.ftruncate(fd, GOOD[1] + 2 * PAGE - 1)
        send(theirs, message((START, GOOD[1], PAGE, 2 * PAGE, 1, 0), fds=2), [fd, fd])
    finally:
        os.close(fd)
    assert refused(ours).reason == "memory"


def test_reset_by_the_peer(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    # Unread data turn its close into a reset.
    ours.send(b"unread")
    theirs.close()
    assert refused(ours).reason == "closed"


def test_time_limit_is_for_all_of_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """A peer that sends a byte now and then does not delay the receiver for longer."""
    ours, theirs = pair
    data, stop = message(*[GOOD] * 1000), threading.Event()

    def trickle() -> None:
        for byte in data:
            if stop.wait(0.1):  # its head alone takes seconds
                return
            theirs.send(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        began = time.monotonic()
        assert refused(ours, 0.2).reason == "timeout"
        assert 0.2 <= time.monotonic() - began < 5
    finally:
        stop.set()
        thread.join()


def test_max_regions_is_a_bound(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    send(theirs, message(GOOD))
    assert refused(ours, max_regions=0).reason == "too-large"


def test_other_users_are_refused_before_anything_is_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    send(theirs, ONE)
    with pytest.raises(HandoverError) as caught:
        recv_uffd(ours, allow_uids=[os.geteuid() + 1])
    assert (caught.value.reason, caught.value.uid) == ("refused", os.geteuid())
    assert ours.recv(len(ONE)) == ONE


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_only_streams(kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs, pytest.raises(ValueError):
        recv_uffd(ours)


def test_only_unix_sockets() -> None:
    with socket.socket(socket.AF_INET) as sock, pytest.raises(ValueError):
        recv_uffd(sock)


def test_only_connected_sockets() -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ValueError):
        recv_uffd(sock)


@pytest.mark.parametrize("options", [{"timeout_s": -1.0}, {"max_regions": -1}])
def test_bad_arguments(
    pair: tuple[socket.socket, socket.socket], options: dict[str, float]
) -> None:
    with pytest.raises(ValueError):
        recv_uffd(pair[0], **options)  # type: ignore[arg-type]


# Mutations of a good message: never anything but a HandoverError


def flip(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(len(data)) :]


def grow(chance: random.Random, data: bytearray) -> None:
    data += chance.randbytes(chance.randrange(1, 100))


def number(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(0, max(1, len(data) - 8))
    value = chance.choice([0, 1, PAGE, 2**31, 2**32 - 1, 2**63, 2**64 - PAGE, 2**64 - 1])
    data[at : at + 8] = struct.pack("<Q", value)


MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [flip, cut, grow, number]


@pytest.mark.parametrize("seed", range(300))
def test_mutated_message(seed: int) -> None:
    chance = random.Random(seed)
    rows = [
        (START + at * HUGE, HUGE, PAGE, at * HUGE, chance.randrange(3), 0)
        for at in range(chance.randrange(4))
    ]
    count = chance.randrange(5)
    data = bytearray(message(*rows, fds=max(1, count)))
    for mutation in chance.choices(MUTATIONS, k=chance.randrange(1, 4)):
        if data:
            mutation(chance, data)
    ours, theirs = socket.socketpair()
    with ours, theirs, pipe() as fd:
        if data:
            send(theirs, bytes(data), [fd] * count)
        theirs.close()
        # A pipe is no userfaultfd, so it is refused.
        assert refused(ours).reason


def test_error_pickles() -> None:
    error = HandoverError("ranges", "they overlap", 17, 1000)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, HandoverError)
    assert issubclass(HandoverError, UffdError)
    assert (again.reason, again.pid, again.uid, str(again)) == (
        "ranges",
        17,
        1000,
        "they overlap (peer: pid 17, uid 1000)",
    )
