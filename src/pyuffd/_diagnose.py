"""Why the kernel refused an ioctl: what /proc says of the memory, after the failure (layer L2).

EINVAL of UFFDIO_REGISTER has a dozen causes, and the kernel names none.  Nothing here is asked
before something has failed, nothing raises, and what cannot be told is left out.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyuffd import _machine, _vmas
from pyuffd._abi import CopyMode, Feature, RegisterMode
from pyuffd._errors import UffdOSError
from pyuffd._pages import PAGE_SIZE
from pyuffd._vmas import Vma

_REGISTERED = {"um", "uw", "ui"}
_KNOWN_MODES = RegisterMode.MISSING | RegisterMode.WP | RegisterMode.MINOR | RegisterMode.RWP
_SPECIAL = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]", "/secretmem")
_FILLS = ("UFFDIO_COPY", "UFFDIO_ZEROPAGE", "fill")
_EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, and of whom.

    `pid` is the process whose memory it is, or None where nobody knows; `src` the address that a
    copy reads in this process, or a move in the owner's memory.
    """

    op: str
    start: int
    length: int
    pid: int | None
    mode: int = 0
    src: int = 0
    features: Feature = Feature(0)  # noqa: RUF009 - an immutable flag
    own: tuple[tuple[int, int], ...] = ()  # what is registered with the same userfaultfd

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.start + self.length


def explained(error: UffdOSError, asked: Asked) -> UffdOSError:
    """Return the error with what caused it as its hint, if that can be told."""
    if error.hint:
        return error
    hint = ""
    with suppress(Exception):
        hint = next(_causes(error.errno or 0, error, asked), "")
    return error.with_hint(hint) if hint else error


def _causes(code: int, error: UffdOSError, asked: Asked) -> Iterator[str]:
    match code:
        case errno.EAGAIN:
            if not error.data.get("completed") and asked.features & _EVENTS:
                yield (
                    "the owner is forking or changing its mappings, and waits for the event to be"
                    " read: read_events(), then try again"
                )
        case errno.ENOMEM:
            yield from _no_memory(asked)
        case errno.EFAULT:
            yield from _unreadable(asked)
        case errno.EINVAL | errno.ENOENT | errno.EPERM | errno.EBUSY:
            if asked.pid is None:
                return
            vmas = list(_vmas.overlapping(asked.start, asked.end, pid=asked.pid, details=True))
            if asked.op in ("UFFDIO_REGISTER", "UFFDIO_UNREGISTER"):
                yield from _not_registrable(code, asked, vmas)
            elif asked.op == "UFFDIO_MOVE":
                yield from _not_movable(asked, vmas)
            else:
                yield from _not_fillable(code, asked, vmas)


def why_unresolved(code: int, address: int, pid: int | str = "self") -> str:
    """Say why a page could not be put in place for seconds: no huge page, as a rule."""
    if code not in (errno.EAGAIN, errno.ENOMEM):
        return ""
    with suppress(Exception):
        for vma in _vmas.overlapping(address, address + 1, pid=pid, details=True):
            if vma.page_size > PAGE_SIZE:
                return (
                    "no huge page was free for it (or the mount's or the control group's quota is"
                    f" met): {_machine.shortage(vma.page_size, 1, -1)}"
                )
    return ""


def mergeable(start: int, end: int, pid: int | str = "self") -> Vma | None:
    """Return the first mapping of a range that KSM may merge pages of (MADV_MERGEABLE).

    It replaces a write-protected page by a shared one and forgets the protection (Linux 6.18):
    later writes may go unseen.  smaps is read only where the process has such memory at all.
    """
    with suppress(Exception):
        stat = Path(f"/proc/{pid}/ksm_stat")
        if stat.exists() and "ksm_mergeable: no" in stat.read_text():
            return None
        for vma in _vmas.overlapping(start, end, pid=pid, details=True):
            if "mg" in vma.flags:
                return vma
    return None


# Whole ranges


def _not_mapped(asked: Asked, vmas: list[Vma]) -> Iterator[str]:
    at = asked.start
    for vma in vmas:
        if vma.start > at:
            break
        at = vma.end
    if at < asked.end:
        yield f"nothing is mapped at {at:#x}"


def _not_aligned(asked: Asked, vmas: list[Vma]) -> Iterator[str]:
    for vma in vmas:
        size = vma.page_size
        ends = [at for at in (asked.start, asked.end) if vma.start <= at <= vma.end]
        if size > PAGE_SIZE and any(at % size for at in ends):
            yield (
                f"{vma} is made of huge pages of {size:#x} bytes: address and length must be"
                " multiples of that"
            )


def _no_memory(asked: Asked) -> Iterator[str]:
    if asked.pid is None:
        return
    if not os.path.exists(f"/proc/{asked.pid}"):
        yield f"process {asked.pid}, whose memory it is, has exited"
        return
    for vma in _vmas.overlapping(asked.start, asked.end, pid=asked.pid, details=True):
        if vma.page_size > PAGE_SIZE and asked.op != "UFFDIO_REGISTER":
            pages = max(1, asked.length // vma.page_size)
            yield _machine.shortage(vma.page_size, pages, -1)
    if problem := _machine.too_many_mappings(asked.pid):
        yield problem
    yield "no memory is left, or the limit of a memory control group or of a tmpfs is met"


# Registering


def _not_registrable(code: int, asked: Asked, vmas: list[Vma]) -> Iterator[str]:
    if not vmas:
        yield f"nothing is mapped at {asked.start:#x}"
    if code == errno.EBUSY:
        yield from _owned_by_others(asked, vmas)
        return
    if code == errno.EPERM:
        for vma in vmas:
            if vma.shared and "mw" not in vma.flags:
                yield (
                    f"{vma} ({vma.path}) is shared memory mapped without write permission: map it"
                    " from a descriptor that is open for writing (O_RDWR) and not sealed"
                )
        return
    yield from _not_aligned(asked, vmas)
    if asked.op == "UFFDIO_UNREGISTER":
        yield from _owned_by_others(asked, vmas)
        return
    yield from _bad_modes(asked)
    for vma in vmas:
        yield from _wrong_memory(asked, vma)


def _owned_by_others(asked: Asked, vmas: list[Vma]) -> Iterator[str]:
    for vma in vmas:
        is_own = any(first < vma.end and vma.start < end for first, end in asked.own)
        if vma.flags & _REGISTERED and not is_own:
            yield f"{vma} is registered with another userfaultfd"


def _bad_modes(asked: Asked) -> Iterator[str]:
    if unknown := asked.mode & ~int(_KNOWN_MODES):
        yield f"mode {unknown:#x} is unknown"
    if asked.mode & RegisterMode.RWP and not asked.features & Feature.RWP:
        yield "RegisterMode.RWP needs a userfaultfd with Feature.RWP (Linux 7.3)"
    if asked.mode & RegisterMode.RWP and asked.mode & RegisterMode.WP:
        yield "RegisterMode.RWP and RegisterMode.WP exclude each other"


def _wrong_memory(asked: Asked, vma: Vma) -> Iterator[str]:
    kind = kind_of(vma, asked.pid or "self")
    if kind == "file":
        only_wp = asked.mode == RegisterMode.WP and not asked.features & Feature.WP_ASYNC
        otherwise = (
            "with Feature.WP_ASYNC its writes can be tracked"
            if only_wp
            else "serve a Region.anonymous from a FileSource instead"
        )
        yield (
            f"{vma} is mapped from {vma.path}, an ordinary file: only anonymous memory, tmpfs"
            f" (memfd, shared memory) and hugetlb can be registered; {otherwise}"
        )
    if kind == "special":
        what = vma.path or "the memory of a device"
        yield f"{vma} is {what}, which cannot be registered"
    if kind == "anon" and asked.mode & RegisterMode.MINOR:
        yield (
            f"{vma} is anonymous memory, which has no page cache: RegisterMode.MINOR is for shared"
            " memory (memfd) and hugetlb"
        )


def kind_of(vma: Vma, pid: int | str = "self") -> str:
    """Return "anon", "shmem", "hugetlb", "file" or "special"."""
    if "ht" in vma.flags or vma.page_size > PAGE_SIZE:
        return "hugetlb"
    if vma.path.startswith(_SPECIAL) or vma.flags & {"io", "pf"}:
        return "special"
    if not vma.inode or (vma.path == "/dev/zero" and not vma.shared):
        return "anon"
    if vma.path.startswith(("/memfd:", "/SYSV", "/dev/zero")):
        return "shmem"
    if vma.path.startswith("anon_inode:"):
        return "special"
    return "shmem" if _file_systems(pid).get(vma.device) == "tmpfs" else "file"


def _file_systems(pid: int | str) -> dict[int, str]:
    """Return the type of each mounted file system by device."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields = line.split()
        major, minor = map(int, fields[2].split(":"))
        found[os.makedev(major, minor)] = fields[fields.index("-") + 1]
    return found


# Filling and protecting


def _not_fillable(code: int, asked: Asked, vmas: list[Vma]) -> Iterator[str]:
    protects = asked.op == "UFFDIO_WRITEPROTECT"
    yield from _not_mapped(asked, vmas)
    if code == errno.EINVAL:
        yield from _not_aligned(asked, vmas)
    for vma in vmas:
        if not vma.flags & _REGISTERED:
            yield f"{vma} is not registered: register() it first"
        elif (protects or asked.mode & CopyMode.WP) and "uw" not in vma.flags:
            wanted = "writeprotect()" if protects else "CopyMode.WP"
            yield (
                f"{vma} is not registered for RegisterMode.WP, which {wanted} needs: register it"
                " with RegisterMode.MISSING | RegisterMode.WP"
            )
        if "ZEROPAGE" in asked.op and vma.page_size > PAGE_SIZE:
            yield f"{vma} is made of huge pages, which UFFDIO_ZEROPAGE cannot fill: copy zeros"
        if "CONTINUE" in asked.op.upper() and kind_of(vma, asked.pid or "self") == "anon":
            yield f"{vma} is anonymous memory, which has no page cache to continue from"
    if code == errno.ENOENT and len(vmas) > 1 and not protects:
        yield (
            f"the range spans {len(vmas)} mappings, and one call must stay inside one: split it at"
            f" {vmas[0].end:#x}"
        )
    if code == errno.EINVAL and asked.mode & ~3:
        yield f"mode {asked.mode:#x} has bits that are unknown"


def _not_movable(asked: Asked, vmas: list[Vma]) -> Iterator[str]:
    yield from _not_mapped(asked, vmas)
    pid = asked.pid or "self"
    src = Asked(asked.op, asked.src, asked.length, asked.pid)
    sources = list(_vmas.overlapping(src.start, src.end, pid=pid, details=True))
    for text in _not_mapped(src, sources):
        yield f"src: {text}"
    for name, parts in (("dst", vmas), ("src", sources)):
        if len(parts) > 1:
            yield f"{name} spans {len(parts)} mappings: split it at {parts[0].end:#x}"
        for vma in parts:
            if kind_of(vma, pid) != "anon":
                yield f"{name} {vma} is not anonymous memory, the only kind that can be moved"
    for vma in vmas:
        if not vma.flags & _REGISTERED:
            yield f"dst {vma} is not registered: register() it first"
    dst, source = vmas[0], sources[0]
    if not source.writable:
        yield f"src {source} is not writable"
    if dst.permissions != source.permissions:
        yield f"dst is mapped {dst.permissions} and src {source.permissions}: they must be alike"
    if ("lo" in dst.flags) != ("lo" in source.flags):
        yield "one of dst and src is locked (mlock) and the other is not"
    if not asked.mode & 2:
        yield "a page of src is missing: MoveMode.ALLOW_SRC_HOLES skips such"


def _unreadable(asked: Asked) -> Iterator[str]:
    if "CONTINUE" in asked.op.upper():
        yield (
            "the page cache lacks a page of it: write it through another mapping of the same"
            " memory first (Region.alias)"
        )
    if "COPY" in asked.op.upper():
        src = Asked(asked.op, asked.src, asked.length, None)
        sources = list(_vmas.overlapping(src.start, src.end))
        for text in _not_mapped(src, sources):
            yield f"the source: {text} in this process"
        for vma in sources:
            if "r" not in vma.permissions:
                yield f"the source: {vma} is not readable"
    if asked.op.startswith(_FILLS):
        yield (
            "the file behind the source, or behind the range, ends before it, or a page of the"
            " source is poisoned"
        )
