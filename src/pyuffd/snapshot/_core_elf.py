"""The bytes of an ELF core: headers and notes. Pure functions; see elf(5) and core(5)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PAGE_SIZE = 4096
EHDR_SIZE, PHDR_SIZE, SHDR_SIZE = 64, 56, 64

_ET_CORE, _EM_X86_64, _EV_CURRENT = 4, 62, 1
_PT_LOAD, _PT_NOTE = 1, 4
_PN_XNUM = 0xFFFF
_EXECUTE, _WRITE, _READ = 1, 2, 4

NT_PRSTATUS, NT_FPREGSET, NT_PRPSINFO, NT_AUXV = 1, 2, 3, 6
NT_SIGINFO, NT_FILE, NT_X86_XSTATE = 0x53494749, 0x46494C45, 0x202

_EHDR = struct.Struct("<16s2HI3QI6H")
_PHDR = struct.Struct("<2I6Q")
_SHDR = struct.Struct("<2I4Q2I2Q")
_NOTE = struct.Struct("<3I")
_IDENT = bytes((0x7F, *b"ELF", 2, 1, 1)) + bytes(9)  # 64 bits, little endian

_PRSTATUS = struct.Struct("<3ih2xQQ4i8q216si4x")
_PRPSINFO = struct.Struct("<bcbb4xQ2I4i16s80s")
_SIGINFO = struct.Struct("<3i116x")
_FILE_HEAD = struct.Struct("<2Q")
_FILE_ROW = struct.Struct("<3Q")

assert (_EHDR.size, _PHDR.size, _SHDR.size) == (EHDR_SIZE, PHDR_SIZE, SHDR_SIZE)
assert (_PRSTATUS.size, _PRPSINFO.size, _SIGINFO.size) == (336, 136, 128)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a mapping: `size` of its bytes are in the file, at `offset`."""

    start: int
    end: int
    permissions: str
    size: int
    offset: int


def note(kind: int, content: bytes, name: bytes = b"CORE") -> bytes:
    """Return one note; names and contents are padded to 4 bytes."""
    name += b"\0"
    return b"".join(
        (_NOTE.pack(len(name), len(content), kind), name, bytes(-len(name) % 4), content)
    ) + bytes(-len(content) % 4)


def elf_header(phdrs_at: int, phdrs: int, shdr_at: int) -> bytes:
    """Return the header; more program headers than it can count are in section header 0."""
    many = phdrs >= _PN_XNUM
    return _EHDR.pack(
        _IDENT,
        _ET_CORE,
        _EM_X86_64,
        _EV_CURRENT,
        0,
        phdrs_at,
        shdr_at if many else 0,
        0,
        EHDR_SIZE,
        PHDR_SIZE,
        _PN_XNUM if many else phdrs,
        SHDR_SIZE if many else 0,
        1 if many else 0,
        0,
    )


def section_header(phdrs: int) -> bytes:
    """Return section header 0, which has the number of program headers; b"" if not needed."""
    if phdrs < _PN_XNUM:
        return b""
    return _SHDR.pack(0, 0, 0, 0, 0, 1, 0, phdrs, 0, 0)  # sh_size: sections, sh_info: headers


def program_headers(notes_at: int, notes_size: int, segments: Sequence[Segment]) -> bytes:
    """Return the table of program headers: the notes, and the segments in their order."""
    rows = [_PHDR.pack(_PT_NOTE, 0, notes_at, 0, 0, notes_size, 0, 4)]
    for part in segments:
        flags = sum(
            bit
            for letter, bit in (("r", _READ), ("w", _WRITE), ("x", _EXECUTE))
            if letter in part.permissions
        )
        length = part.end - part.start
        row = (_PT_LOAD, flags, part.offset, part.start, 0, part.size, length, PAGE_SIZE)
        rows.append(_PHDR.pack(*row))
    return b"".join(rows)


# Notes


def prstatus(
    *,
    tid: int,
    parent: int,
    group: int,
    session: int,
    pending: int,
    blocked: int,
    times_us: Sequence[int],
    registers: bytes,
    has_floating: bool,
) -> bytes:
    """Return NT_PRSTATUS; `times_us`: user, system, and both of the children."""
    times = (part for time in times_us for part in divmod(time, 1_000_000))
    content = _PRSTATUS.pack(
        *(0, 0, 0, 0),
        *(pending, blocked, tid, parent, group, session),
        *times,
        registers,
        has_floating,
    )
    return note(NT_PRSTATUS, content)


def siginfo(number: int) -> bytes:
    """Return NT_SIGINFO of a thread that a signal has stopped, or of one that runs (0)."""
    return note(NT_SIGINFO, _SIGINFO.pack(number, 0, 0))


def prpsinfo(
    *,
    state: str,
    nice: int,
    flags: int,
    uid: int,
    gid: int,
    pid: int,
    parent: int,
    group: int,
    session: int,
    name: bytes,
    arguments: bytes,
) -> bytes:
    """Return NT_PRPSINFO; texts that are too long are cut."""
    number = max("RSDTZW".find(state), 0)
    content = _PRPSINFO.pack(
        number,
        state.encode(),
        state == "Z",
        nice,
        flags,
        *(uid, gid, pid, parent, group, session),
        name[:15],
        arguments.rstrip(b"\0").replace(b"\0", b" ")[:79],
    )
    return note(NT_PRPSINFO, content)


def files(rows: Iterable[tuple[int, int, int, bytes]]) -> bytes:
    """Return NT_FILE of (start, end, offset in the file, path)."""
    packed, names = [], []
    for start, end, offset, path in rows:
        packed.append(_FILE_ROW.pack(start, end, offset // PAGE_SIZE))
        names.append(path + b"\0")
    head = _FILE_HEAD.pack(len(packed), PAGE_SIZE)
    return note(NT_FILE, b"".join((head, *packed, *names)))
