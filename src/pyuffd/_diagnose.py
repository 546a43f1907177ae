"""Find out from /proc why the kernel refused an ioctl, after the failure (layer L2).

EINVAL of UFFDIO_REGISTER has a dozen causes, and the kernel does not tell which.  Nothing here runs
before a failure, nothing raises, and a cause that is not certain is not reported.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pyuffd import _huge_pages, _machine, _vmas
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
    """The request that was refused.

    `pid` is the process whose memory it is, or None if that is unknown. `src` is the address that
    a copy reads in this process, or a move in the owner's memory.
    """

    op: str
    start: int
    length: int
    pid: int | None
    mode: int = 0
    src: int = 0
    features: Feature = Feature(0)  # noqa: RUF009 - an immutable flag
    own: tuple[tuple[int, int], ...] = ()  # ranges registered with the same userfaultfd

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.start + self.length


class _Quiet(threading.local):
    depth = 0


_quiet = _Quiet()


@contextmanager
def unexplained() -> Iterator[None]:
    """Do not look for causes in this thread: for errors that are expected, and looked at by errno.

    The cause may be in smaps, whose reading takes milliseconds for each GiB of the process.
    """
    _quiet.depth += 1
    try:
        yield
    finally:
        _quiet.depth -= 1


def explained(error: UffdOSError, asked: Asked) -> UffdOSError:
    """Return the error with its cause as the hint, if the cause can be found."""
    if error.hint or _quiet.depth:
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
                    "the owner is forking or changing its mappings, and waits until the event is"
                    " read: call read_events(), then try again"
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
    """Return why there was no memory for a page for seconds, if that is certain; else ""."""
    if code not in (errno.EAGAIN, errno.ENOMEM):
        return ""
    with suppress(Exception):
        for vma in _vmas.overlapping(address, address + 1, pid=pid, details=True):
            if vma.page_size > PAGE_SIZE:
                return f"no huge page was free for it: {_huge_pages.why_none(vma, pid)}"
            return _full_file_system(vma, pid)
    return ""


def _full_file_system(vma: Vma, pid: int | str) -> str:
    """Return that the tmpfs of a mapped file is full, or ""."""
    if not vma.path.startswith("/"):
        return ""
    try:  # needs CAP_SYS_ADMIN
        held = os.statvfs(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}")
    except PermissionError:
        if os.stat(vma.path).st_ino != vma.inode:
            return ""
        held = os.statvfs(vma.path)
    if held.f_bavail or not held.f_blocks:
        return ""
    return f"the file system of {vma.path} is full, {held.f_blocks * held.f_frsize >> 10} KiB"


def why_unreadable(start: int, end: int, pid: int | str = "self") -> str:
    """Return which mapping of a range may not be read, or ""."""
    with suppress(Exception):
        for vma in _vmas.overlapping(start, end, pid=pid):
            if "r" not in vma.permissions:
                return f"{vma} may not be read (mprotect(2)): allow it before"
    return ""


def mergeable(start: int, end: int, pid: int | str = "self") -> Vma | None:
    """Return the first mapping of a range whose pages KSM may merge (MADV_MERGEABLE), or None.

    KSM replaces a write-protected page with a shared one and loses the protection (Linux 6.18), so
    later writes may not be seen.  smaps is read only if the process has such memory.
    """
    with suppress(Exception):
        with suppress(FileNotFoundError):
            if "ksm_mergeable: no" in _machine.read_text(f"/proc/{pid}/ksm_stat"):
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
                f"{vma} consists of huge pages of {size:#x} bytes: address and length must be"
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
            yield _huge_pages.why_none(vma, asked.pid, needed=pages)
    if problem := _machine.too_many_mappings(asked.pid):
        yield problem
    yield "no memory is left, or the limit of a memory control group or a tmpfs is reached"


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
                    f"{vma} ({vma.path}) is shared memory whose descriptor does not allow writing:"
                    " map it from one that is open for writing (O_RDWR) and not sealed"
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
        yield "RegisterMode.RWP and RegisterMode.WP cannot be combined"


def _wrong_memory(asked: Asked, vma: Vma) -> Iterator[str]:
    kind = kind_of(vma, asked.pid or "self")
    if kind == "file":
        only_wp = asked.mode == RegisterMode.WP and not asked.features & Feature.WP_ASYNC
        otherwise = (
            "writes to it can be tracked with Feature.WP_ASYNC"
            if only_wp
            else "serve a Region.anonymous from a FileSource instead"
        )
        yield (
            f"{vma} is mapped from {vma.path}, an ordinary file: only anonymous memory, tmpfs"
            f" (memfd, shared memory) and hugetlb memory can be registered; {otherwise}"
        )
    if kind == "special":
        what = vma.path or "the memory of a device"
        yield f"{vma} is {what}, which cannot be registered"
    if kind == "anon" and asked.mode & RegisterMode.MINOR:
        yield (
            f"{vma} is anonymous memory, which has no page cache: RegisterMode.MINOR is for shared"
            " memory (memfd) and hugetlb memory"
        )


def kind_of(vma: Vma, pid: int | str = "self") -> str:
    """Return "anon", "shmem", "hugetlb", "file" or "special"."""
    if "ht" in vma.flags or vma.page_size > PAGE_SIZE:
        return "hugetlb"
    if vma.path.startswith(_SPECIAL) or vma.flags & {"io", "pf"}:
        return "special"
    if not vma.has_file:
        return "anon"
    if vma.path.startswith(("/memfd:", "/SYSV", "/dev/zero")):
        return "shmem"
    if vma.path.startswith("anon_inode:"):
        return "special"
    return "shmem" if _file_systems(pid).get(vma.device) == "tmpfs" else "file"


def is_ordinary_file(vma: Vma) -> bool:
    """Return whether it is of a file system that userfaultfd does not support.

    False if that is unknown: the file system of a descriptor need not be mounted here.
    """
    return kind_of(vma) == "file" and vma.device in _file_systems("self")


def _file_systems(pid: int | str) -> dict[int, str]:
    """Return the type of each mounted file system, by device number."""
    found = {}
    for line in _machine.read_text(f"/proc/{pid}/mountinfo").splitlines():
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
            yield f"{vma} is not registered: call register() first"
        elif (protects or asked.mode & CopyMode.WP) and "uw" not in vma.flags:
            wanted = "writeprotect()" if protects else "CopyMode.WP"
            yield (
                f"{vma} is not registered for RegisterMode.WP, which {wanted} needs: register it"
                " with RegisterMode.MISSING | RegisterMode.WP"
            )
        if "ZEROPAGE" in asked.op and vma.page_size > PAGE_SIZE:
            yield f"{vma} consists of huge pages, which UFFDIO_ZEROPAGE cannot fill: copy zeros"
        if "CONTINUE" in asked.op.upper() and kind_of(vma, asked.pid or "self") == "anon":
            yield f"{vma} is anonymous memory, which has no page cache"
    if code == errno.ENOENT and len(vmas) > 1 and not protects:
        yield (
            f"the range spans {len(vmas)} mappings, but must lie in one mapping: split it at"
            f" {vmas[0].end:#x}"
        )
    if code == errno.EINVAL and asked.mode & ~3:
        yield f"mode {asked.mode:#x} has unknown bits"


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
                yield f"{name} {vma} is not anonymous memory: no other memory can be moved"
    for vma in vmas:
        if not vma.flags & _REGISTERED:
            yield f"dst {vma} is not registered: call register() first"
    dst, source = vmas[0], sources[0]
    if not source.writable:
        yield f"src {source} is not writable"
    if dst.permissions != source.permissions:
        yield f"dst is mapped {dst.permissions} and src {source.permissions}: they must be equal"
    if ("lo" in dst.flags) != ("lo" in source.flags):
        yield "one of dst and src is locked (mlock) and the other is not"
    if not asked.mode & 2:
        yield "a page of src is missing: MoveMode.ALLOW_SRC_HOLES skips missing pages"


def _unreadable(asked: Asked) -> Iterator[str]:
    if "CONTINUE" in asked.op.upper():
        yield (
            "the page cache lacks a page of the range: write it first through another mapping of"
            " the same memory (Region.alias)"
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
            "the file of the source or of the range is too short, or a page of the source is"
            " poisoned"
        )
