"""Numbers and messages, compared with tables written out here and not copied from a header.

The ioctl numbers carry direction and struct size: direction << 30 | size << 16 | 0xAA << 8 | nr,
direction 2 for _IOR, 1 for _IOW, 3 for _IOWR.
"""

from __future__ import annotations

import copy
import os
import pickle
import struct
from enum import IntFlag

import pytest

import pyuffd
from pyuffd import (
    ContinueMode,
    CopyMode,
    EventCode,
    Feature,
    Ioctl,
    MoveMode,
    PageBit,
    PageCategory,
    Pagefault,
    PagefaultFlag,
    PoisonMode,
    RegisterMode,
    Remap,
    Remove,
    RwprotectMode,
    ScanFlag,
    UnknownEvent,
    Unmap,
    WriteprotectMode,
    ZeropageMode,
    lowlevel,
)
from pyuffd._abi import USER_MODE_ONLY
from pyuffd._events import MESSAGE_SIZE, fork_fd, message_code, parse_event

IOCTLS = {
    "REGISTER": 0xC020AA00,
    "UNREGISTER": 0x8010AA01,
    "WAKE": 0x8010AA02,
    "COPY": 0xC028AA03,
    "ZEROPAGE": 0xC020AA04,
    "MOVE": 0xC028AA05,
    "WRITEPROTECT": 0xC018AA06,
    "CONTINUE": 0xC020AA07,
    "POISON": 0xC020AA08,
    "RWPROTECT": 0xC018AA09,
    "SET_MODE": 0x4010AA0A,
    "API": 0xC018AA3F,
}

BITS: dict[type[IntFlag], dict[str, int]] = {
    Feature: {
        "PAGEFAULT_FLAG_WP": 0,
        "EVENT_FORK": 1,
        "EVENT_REMAP": 2,
        "EVENT_REMOVE": 3,
        "MISSING_HUGETLBFS": 4,
        "MISSING_SHMEM": 5,
        "EVENT_UNMAP": 6,
        "SIGBUS": 7,
        "THREAD_ID": 8,
        "MINOR_HUGETLBFS": 9,
        "MINOR_SHMEM": 10,
        "EXACT_ADDRESS": 11,
        "WP_HUGETLBFS_SHMEM": 12,
        "WP_UNPOPULATED": 13,
        "POISON": 14,
        "WP_ASYNC": 15,
        "MOVE": 16,
        "RWP": 17,
        "RWP_ASYNC": 18,
    },
    RegisterMode: {"MISSING": 0, "WP": 1, "MINOR": 2, "RWP": 3},
    CopyMode: {"DONTWAKE": 0, "WP": 1},
    ZeropageMode: {"DONTWAKE": 0},
    MoveMode: {"DONTWAKE": 0, "ALLOW_SRC_HOLES": 1},
    WriteprotectMode: {"WP": 0, "DONTWAKE": 1},
    ContinueMode: {"DONTWAKE": 0, "WP": 1},
    PoisonMode: {"DONTWAKE": 0},
    RwprotectMode: {"RWP": 0, "DONTWAKE": 1},
    Ioctl: {
        "REGISTER": 0,
        "UNREGISTER": 1,
        "WAKE": 2,
        "COPY": 3,
        "ZEROPAGE": 4,
        "MOVE": 5,
        "WRITEPROTECT": 6,
        "CONTINUE": 7,
        "POISON": 8,
        "RWPROTECT": 9,
        "SET_MODE": 10,
        "API": 63,
    },
    PagefaultFlag: {"WRITE": 0, "WP": 1, "MINOR": 2, "RWP": 3},
    PageCategory: {
        "WPALLOWED": 0,
        "WRITTEN": 1,
        "FILE": 2,
        "PRESENT": 3,
        "SWAPPED": 4,
        "PFNZERO": 5,
        "HUGE": 6,
        "SOFT_DIRTY": 7,
        "GUARD": 8,
        "ACCESSED": 9,
    },
    ScanFlag: {"WP_MATCHING": 0, "CHECK_WPASYNC": 1},
    PageBit: {
        "SOFT_DIRTY": 55,
        "MMAP_EXCLUSIVE": 56,
        "UFFD_WP": 57,
        "GUARD_REGION": 58,
        "FILE": 61,
        "SWAP": 62,
        "PRESENT": 63,
    },
}

EVENTS = {"PAGEFAULT": 0x12, "FORK": 0x13, "REMAP": 0x14, "REMOVE": 0x15, "UNMAP": 0x16}

# Read from a userfaultfd of Linux 6.18, which leaves the unused bytes zero.
MESSAGES = {
    "pagefault": "12000000 00000000 0300000000000000 00a0d1f7ff7f0000 2a10000000000000",
    "fork": "13000000 00000000 0700000000000000 0000000000000000 0000000000000000",
    "remap": "14000000 00000000 0000a0f7ff7f0000 0000c0f7ff7f0000 0000200000000000",
    "remove": "15000000 00000000 0010a0f7ff7f0000 0030a0f7ff7f0000 0000000000000000",
    "unmap": "16000000 00000000 0000a0f7ff7f0000 0000c0f7ff7f0000 0000000000000000",
    "unknown": "fe010203 04050607 1111111111111111 2222222222222222 3333333333333333",
}

FLAGS = pytest.mark.parametrize("flags", BITS, ids=lambda flags: flags.__name__)


def message(name: str) -> bytes:
    return bytes.fromhex(MESSAGES[name])


@pytest.mark.parametrize("name", IOCTLS)
def test_ioctl_number(name: str) -> None:
    assert hex(lowlevel.ioctl_number(BITS[Ioctl][name])) == hex(IOCTLS[name])


def test_every_ioctl_is_in_the_table() -> None:
    known = {nr for nr in range(256) if lowlevel.ioctl_number(nr)}
    assert known == {number & 0xFF for number in IOCTLS.values()}


@FLAGS
def test_bits_by_name(flags: type[IntFlag]) -> None:
    named = {name: 1 << bit for name, bit in BITS[flags].items()}
    assert {name: int(bit) for name, bit in flags.__members__.items()} == named


def test_every_flag_class_is_in_the_table() -> None:
    public = {getattr(pyuffd, name) for name in pyuffd.__all__}
    assert {cls for cls in public if isinstance(cls, type) and issubclass(cls, IntFlag)} == set(
        BITS
    )


@FLAGS
def test_unknown_bits_are_kept(flags: type[IntFlag]) -> None:
    unknown = 1 << 40
    known = next(iter(flags))
    both = flags(unknown | known)
    assert int(both) == unknown | known
    assert isinstance(both, flags)
    assert known in both
    assert int(flags(unknown) | known) == int(both)
    assert repr(flags(unknown))
    for copied in (pickle.loads(pickle.dumps(both)), copy.copy(both)):
        assert (int(copied), type(copied)) == (int(both), flags)


def test_event_codes() -> None:
    assert {code.name: int(code) for code in EventCode} == EVENTS


def test_other_numbers() -> None:
    assert (MESSAGE_SIZE, USER_MODE_ONLY) == (32, 1)


def test_messages_are_of_the_recorded_size() -> None:
    assert {len(message(name)) for name in MESSAGES} == {MESSAGE_SIZE}


@pytest.mark.parametrize(
    ("name", "event"),
    [
        (
            "pagefault",
            Pagefault(0x7FFFF7D1A000, PagefaultFlag.WRITE | PagefaultFlag.WP, 0x102A),
        ),
        ("remap", Remap(0x7FFFF7A00000, 0x7FFFF7C00000, 0x200000)),
        ("remove", Remove(0x7FFFF7A01000, 0x7FFFF7A03000)),
        ("unmap", Unmap(0x7FFFF7A00000, 0x7FFFF7C00000)),
        ("unknown", UnknownEvent(0xFE, message("unknown"))),
    ],
)
def test_parse(name: str, event: object) -> None:
    parsed = parse_event(message(name))
    assert parsed == event
    assert type(parsed) is type(event)


def test_fork_message() -> None:
    raw = message("fork")
    assert message_code(raw) == EventCode.FORK
    assert fork_fd(raw) == 7


def test_highest_addresses_are_positive() -> None:
    raw = struct.pack("=B7xQQQ", EventCode.REMOVE, (1 << 64) - 4096, (1 << 64) - 1, 0)
    assert parse_event(raw) == Remove((1 << 64) - 4096, (1 << 64) - 1)


def test_unknown_pagefault_flags_survive() -> None:
    raw = struct.pack("=B7xQQQ", EventCode.PAGEFAULT, 1 << 50 | 1, 0x1000, 0)
    event = parse_event(raw)
    assert isinstance(event, Pagefault)
    assert int(event.flags) == 1 << 50 | 1


def test_upper_half_of_a_thread_id_is_not_ours() -> None:
    raw = struct.pack("=B7xQQLL", EventCode.PAGEFAULT, 0, 0x1000, 77, 0xFFFFFFFF)
    event = parse_event(raw)
    assert isinstance(event, Pagefault)
    assert event.thread_id == 77


def test_unknown_event_keeps_its_own_copy() -> None:
    raw = bytearray(message("unknown"))
    event = parse_event(bytes(raw))
    raw[:] = bytes(MESSAGE_SIZE)
    assert event == UnknownEvent(0xFE, message("unknown"))


def test_addresses_print_in_hex() -> None:
    assert "0x7ffff7d1a000" in repr(parse_event(message("pagefault")))


def test_reading_gives_events_in_order(tmp_path: os.PathLike[str]) -> None:
    """`lowlevel.read` returns whole messages, here from a file."""
    path = os.path.join(tmp_path, "messages")
    names = ["pagefault", "remap", "remove", "unmap", "unknown"]
    with open(path, "wb") as file:
        file.write(b"".join(map(message, names)))
    fd = os.open(path, os.O_RDONLY)
    try:
        raw = lowlevel.read(fd, 3 * MESSAGE_SIZE)
        assert raw == b"".join(map(message, names[:3]))
        assert lowlevel.read(fd, 64 * MESSAGE_SIZE) == b"".join(map(message, names[3:]))
    finally:
        os.close(fd)
