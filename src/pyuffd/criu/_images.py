"""The images of a process tree, and what of its memory is restored lazily."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

from pyuffd._arguments import check_bools, check_path
from pyuffd._describe import counted
from pyuffd._errors import CriuError
from pyuffd._pages import PAGE_SIZE
from pyuffd.criu import _schema
from pyuffd.criu._pagemaps import HIGHEST, PagemapChain, Run
from pyuffd.criu._records import MM_MAGIC, PSTREE_MAGIC, parsed, records

# Of mmap(2).
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_LOCKED, _MAP_HUGETLB = 0x02, 0x20, 0x2000, 0x40000
# Bits of a mapping's status in an image: vsyscall, vdso, vvar.
_KERNELS_OWN = 1 << 2 | 1 << 3 | 1 << 12
# One each for the kernel's pid_max, 4,194,304, would be a strange tree.
MOST_TASKS = 1 << 22


@dataclass(frozen=True, slots=True)
class LazySpan:
    """Memory of a process that is restored lazily: adjacent mappings without a gap.

    Attributes:
        start: First address.
        length: Bytes.
        runs: Where its content is, in order; pages between the runs are zeros.
    """

    start: int
    length: int
    runs: Sequence[Run]

    @property
    def content_bytes(self) -> int:
        """The bytes that have content."""
        return sum(run.end - run.start for run in self.runs)


@dataclass(frozen=True, slots=True)
class TaskImage:
    """One process of the tree.

    Attributes:
        pid: Its pid in the image, that is in its own PID namespace.
        spans: What of its memory is restored lazily; none for a zombie.
        is_zombie: Whether it had exited.
    """

    pid: int
    spans: Sequence[LazySpan]
    is_zombie: bool

    @property
    def content_bytes(self) -> int:
        """The bytes that have content."""
        return sum(span.content_bytes for span in self.spans)


class Images:
    """The images of a process tree that `criu dump` has written, as `criu lazy-pages` needs them.

    Everything is read and checked here; only the pages are read later, when they are needed.

    Args:
        folder: The folder with the images.
        is_remote: Whether the content of lazy pages comes from a page server. Pages that only a
            page server has (`criu dump --lazy-pages`) need it.

    Attributes:
        folder: The folder.
        tasks: The processes by pid.
        id: A digest of what the images tell, without the content of the pages.
        has_long_counts: Whether CRIU 4.2 or newer wrote them: its page server speaks the newer
            format.

    Raises:
        CriuError: "image" - a file that is no such image, that contradicts itself or another one,
            or that is shorter than it should be.
        OSError: a file cannot be read.

    Example:
        >>> from pyuffd.criu import Images
        >>> Images("/nonexistent")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: '/nonexistent/pstree.img'
    """

    def __init__(self, folder: str | os.PathLike[str], *, is_remote: bool = False) -> None:
        self.folder: str = check_path("folder", folder)
        check_bools(is_remote=is_remote)
        self.is_remote = is_remote
        self.has_long_counts: bool = False
        self.tasks: dict[int, TaskImage] = {}
        digest = hashlib.sha256()
        path = os.path.join(self.folder, "pstree.img")
        with closing(records(path, PSTREE_MAGIC)) as found:
            for data in found:
                digest.update(data)
                pid = parsed(path, data, _schema.PstreeEntry).pid
                if not 0 < pid <= MOST_TASKS or pid in self.tasks:
                    raise CriuError("image", f"{path}: process {pid} cannot be, or is there twice")
                self.tasks[pid] = self._read_task(pid, digest)
        if not self.tasks:
            raise CriuError("image", f"{path} has no processes")
        self.id: bytes = digest.digest()

    def _read_task(self, pid: int, digest: hashlib._Hash) -> TaskImage:
        path = os.path.join(self.folder, f"mm-{pid}.img")
        if not os.path.exists(path):  # a zombie, or a process that shares its parent's memory
            return TaskImage(pid, (), is_zombie=True)
        chain = PagemapChain(self.folder, pid)
        self.has_long_counts |= bool(chain.levels[0].has_long_counts)
        spans = []
        for start, end in _spans(path):
            runs = _joined(chain.runs(start, end, is_remote=self.is_remote))
            digest.update(repr((start, end, [run[:2] for run in runs])).encode())
            spans.append(LazySpan(start, end - start, runs))
        return TaskImage(pid, spans, is_zombie=False)

    @property
    def content_bytes(self) -> int:
        """The bytes that have content, of all processes."""
        return sum(task.content_bytes for task in self.tasks.values())

    def advise(self, *, will_need: bool = True) -> None:
        """Tell the kernel that the pages files will be read, or that they were."""
        check_bools(will_need=will_need)
        advice = os.POSIX_FADV_WILLNEED if will_need else os.POSIX_FADV_DONTNEED
        paths = {
            run.path
            for task in self.tasks.values()
            for span in task.spans
            for run in span.runs
            if run.path is not None
        }
        for path in paths:
            with suppress(OSError), open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, advice)

    def __repr__(self) -> str:
        return f"<Images {self.folder} of {counted(len(self.tasks), 'process', 'processes')}>"


def _spans(path: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of what is restored lazily, adjacent mappings joined."""
    found = list(records(path, MM_MAGIC))
    if len(found) != 1:
        raise CriuError("image", f"{path} has {len(found)} records, and should have one")
    start = end = last = 0
    for vma in parsed(path, found[0], _schema.Mm).vmas:
        if vma.start % PAGE_SIZE or vma.end % PAGE_SIZE or not last <= vma.start < vma.end:
            raise CriuError("image", f"{path}: the mapping at {vma.start:#x} cannot be")
        last = vma.end
        if not _is_lazy(vma.flags, vma.status) or vma.end > HIGHEST:
            continue
        if vma.start == end:
            end = vma.end
            continue
        if end:
            yield start, end
        start, end = vma.start, vma.end
    if end:
        yield start, end


def _is_lazy(flags: int, status: int) -> bool:
    wanted = _MAP_PRIVATE | _MAP_ANONYMOUS
    refused = _MAP_LOCKED | _MAP_HUGETLB
    return flags & wanted == wanted and not flags & refused and not status & _KERNELS_OWN


def _joined(runs: Iterator[Run]) -> list[Run]:
    """Join adjacent runs."""
    found: list[Run] = []
    for run in runs:
        if found:
            last = found[-1]
            if (last.end, last.path, last.offset + last.end - last.start) == (
                run.start,
                run.path,
                run.offset,
            ):
                found[-1] = last._replace(end=run.end)
                continue
        found.append(run)
    return found
