"""The memory into which snapshots are read: used again, but never while somebody looks at it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from pyuffd.snapshot._format import CHUNK
from pyuffd.snapshot._reading import Reader

FILE = random.Random(1).randbytes(4 * CHUNK)


@pytest.fixture
def descriptor() -> Iterator[int]:
    fd = os.memfd_create("pages")
    os.pwrite(fd, FILE, 0)
    yield fd
    os.close(fd)


def test_what_was_read_stays(descriptor: int) -> None:
    """As if signal handlers read inside one another, and looked at it at the end."""
    reader = Reader()
    views = [reader.read(descriptor, CHUNK, at * CHUNK // 2) for at in range(6)]
    for at, view in enumerate(views):
        assert view == FILE[at * CHUNK // 2 :][:CHUNK]


def test_memory_is_used_again(descriptor: int) -> None:
    reader = Reader()
    used = set()
    view = None
    for at in range(50):
        view = reader.read(descriptor, CHUNK, at % 4 * CHUNK)
        used.add(id(view.obj))
    assert len(used) <= 3


def test_a_read_inside_a_read(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    inner: list[bytes] = []
    preadv = os.preadv

    def interrupted(fd: int, buffers: list[memoryview], offset: int) -> int:
        done = preadv(fd, buffers, offset)
        if not inner:
            inner.append(b"")
            inner.append(bytes(reader.read(fd, CHUNK, CHUNK)))
        return done

    monkeypatch.setattr(os, "preadv", interrupted)
    assert reader.read(descriptor, CHUNK, 0) == FILE[:CHUNK]
    assert inner[1] == FILE[CHUNK : 2 * CHUNK]


def test_up_to_the_end_of_the_file(descriptor: int) -> None:
    assert Reader().read(descriptor, CHUNK, 4 * CHUNK - 100) == FILE[-100:]
