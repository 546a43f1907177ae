"""`Snapshot`: the memory of a process at one instant, read from files."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable

from pyuffd._arguments import check_bools, check_path
from pyuffd._pages import RangeLike
from pyuffd._recording import Until
from pyuffd._uffd import Userfaultfd
from pyuffd._working_set import WorkingSet
from pyuffd.dirty import DirtyTracker, _rows
from pyuffd.handlers import Handler
from pyuffd.snapshot import (
    _core_from,
    _flatten,
    _recorded,
    _request,
    _take,
    _targets,
    _working_sets,
)
from pyuffd.snapshot._capture import Method, SnapshotProgress
from pyuffd.snapshot._content import Gaps
from pyuffd.snapshot._core import CoreFile
from pyuffd.snapshot._helper import take_by_helper
from pyuffd.snapshot._layout import Shared
from pyuffd.snapshot._opened import Opened
from pyuffd.snapshot._reading import Image
from pyuffd.snapshot._request import SnapshotReport
from pyuffd.snapshot._restore import Restore
from pyuffd.snapshot._restore_options import Mode, Verify, checked
from pyuffd.snapshot._restore_plan import Regions, place
from pyuffd.snapshot._share import Shares
from pyuffd.snapshot._targets import Target

# Each parent costs a look for every page that is read.
DEPTH_WARNED = 8


class Snapshot(Opened):
    """The memory of a process at one instant, in a directory; a context manager.

    `take` writes one, `open` reads one. Reading checks every chunk that it touches.

    Attributes:
        path: The directory.
        id: Its id, which its children name.
        manifest: The content of manifest.json, as docs/snapshots.md describes it.

    Threads: needs an external lock.

    Example:
        >>> import subprocess, sys, tempfile
        >>> from pyuffd import Process, Snapshot
        >>> child = subprocess.Popen(
        ...     [sys.executable, "-c", "print(flush=True); input()"],
        ...     stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ... )
        >>> _ = child.stdout.readline()
        >>> with tempfile.TemporaryDirectory() as folder, Process(child.pid) as target:
        ...     done = Snapshot.take(target, f"{folder}/first", method="stopped", durable=False)
        ...     with Snapshot.open(f"{folder}/first") as snapshot:
        ...         snapshot.verify()
        ...         stack = next(r for r in snapshot.regions if r.path == "[stack]")
        ...         len(snapshot.read(stack.end - 4096, 4096))
        4096
        >>> _ = child.communicate()
    """

    def __init__(self, image: Image) -> None:
        self._all_shares: Shares | None = None  # first: `__del__` closes what is half made
        super().__init__(image)

    @classmethod
    def take(
        cls,
        target: Target,
        path: str | os.PathLike[str],
        *,
        method: Method = "auto",
        ranges: Iterable[RangeLike] | None = None,
        shared: Shared = "refuse",
        parent: str | os.PathLike[str] | None = None,
        tracker: DirtyTracker | None = None,
        max_stall_s: float | None = None,
        rounds: int = 8,
        rate: float | None = None,
        durable: bool = True,
        compress: int | None = None,
        progress: Callable[[SnapshotProgress], None] | None = None,
    ) -> SnapshotReport:
        """Write the memory of a running process, as it is at one instant, to a new directory.

        The process runs on, except for a pause. A snapshot that fails, or is killed, leaves no
        directory with this name, and does not change its parent.

        Args:
            target: A process, this one too. Or memory of this process: a `Region`, another range,
                or several of them. Or a `Userfaultfd` with `ranges`: memory of the process that it
                governs. A snapshot of this process is taken by a helper process, which stops all
                threads of this one for the pause. Starting it takes longer than a snapshot of a few
                MiB; names that exist, or do not, are refused before.
            path: The directory, which must not exist; its folder must.
            method: "precopy" copies while the process runs, then again what it has written
                meanwhile, and the last of it in the stop. "cow" protects it while it runs, and
                stops it briefly; afterwards each page is saved before its first write, which waits
                for that. "stopped" copies everything in the stop. "auto" chooses, and takes cow if
                the process writes too fast for precopy; the report says why.
            ranges: Parts of its memory; everything by default.
            shared: What to do about memory that other processes may write, which has no instant:
                "refuse" the snapshot, copy it in the "pause", or "skip" it.
            parent: Another snapshot of this process: this one has only what is different. Without a
                tracker, all memory is read and compared.
            tracker: With `parent`, only what this tracker reports is read: the time needed follows
                the pages written. The parent must be the last snapshot that was taken with the
                tracker. Without `parent`, the tracker reports what is written from the instant on.
                It must track all that is saved.
            max_stall_s: If the process would be stopped for longer, or a thread of it would wait
                longer for a page, the snapshot ends instead. That is estimated before the stop,
                and checked between its steps; `pause_s` tells how long it was.
                None: 0.05; and as long as the copy lasts with "stopped", and for shared memory
                that is copied in the pause.
            rounds: Rounds of copying before that.
            rate: Copy at most this many bytes per second, outside of the stop.
            durable: Return when everything is on the disk.
            compress: A level of zstd, 1 to 22, for each chunk, after the stop; needs zstandard.
            progress: Called now and then.

        Raises:
            ValueError: bad arguments; `ranges` of which the process has nothing mapped, or a region
                of this process among those of another; a userfaultfd without `ranges`; a tracker
                of this process, of another than the target, or of a part of what is to be saved.
            ClosedError: the tracker is closed.
            FileExistsError: EEXIST - there is something with this name.
            HelperLostError: the helper process could not start, or was killed.
            SnapshotError: "busy", "shared", "stalled", "parent", "ended"; see there.
            SnapshotFormatError: the parent is damaged.
            StopTimeoutError: ETIMEDOUT - the process cannot be stopped.
            UffdPermissionError: EPERM, EACCES - ptrace is refused.
            UffdOSError: ENOSPC, EDQUOT, EIO, EFBIG - writing failed; `filename` is the file.
            OSError: the directory cannot be created.

        Kernel: WP_ASYNC and PAGEMAP_SCAN (Linux 6.7) for precopy; ptrace(2).
        GIL: released while copying.  Blocks: as long as it lasts.
        """
        ranges = None if ranges is None else tuple(ranges)
        request = _request.checked(
            path,
            method=method,
            shared=shared,
            ranges=ranges,
            parent=parent,
            tracker=tracker,
            max_stall_s=max_stall_s,
            rounds=rounds,
            rate=rate,
            durable=durable,
            compress=compress,
            progress=progress,
        )
        with _targets.resolved(target, request) as (process, request):
            if process is not None and ranges is not None and request.scope is not None:
                _rows.refuse_own_memory(process, ranges)
                _rows.refuse_unmapped(process, request.scope)
            report = take_by_helper(request) if process is None else _take.take(process, request)
        with cls.open(report.path) as taken:
            if taken.depth >= DEPTH_WARNED:
                warnings.warn(
                    f"{report.path} has {taken.depth} parents, and every read looks through them:"
                    " flatten() makes one snapshot of all",
                    stacklevel=2,
                )
        return report

    # What becomes of it

    def flatten(
        self,
        path: str | os.PathLike[str],
        *,
        durable: bool = True,
        progress: Callable[[SnapshotProgress], None] | None = None,
    ) -> str:
        """Write one snapshot without parents, uncompressed, with the same content; return its id.

        Everything is checked on the way. Its working sets are copied, unless they have a `problem`;
        those of its parents are not.

        Raises:
            FileExistsError: EEXIST - there is something with this name.
            SnapshotFormatError: a chunk was changed.
            UffdOSError: ENOSPC, EDQUOT, EIO, EFBIG - writing failed; `filename` is the file.
            OSError: the directory cannot be created, or a file cannot be read.
        """
        check_bools(durable=durable)
        return _flatten.flatten(
            self._checked(), check_path("path", path), durable=durable, progress=progress
        )

    def write_core(
        self,
        path: str | os.PathLike[str],
        *,
        durable: bool = False,
        progress: Callable[[SnapshotProgress], None] | None = None,
    ) -> CoreFile:
        """Write an ELF core of the process as it was at the instant, for debuggers.

        It has what the snapshot and its parents have, whatever coredump_filter and MADV_DONTDUMP
        said, and the registers of all threads. Everything that is read is checked. Pages of mapped
        files that the process had not written are in those files only, which debuggers look for by
        their names.

        Args:
            path: Where to put it. A link there is not followed.
            durable: Wait until the file is on the disk.
            progress: Called now and then.

        Returns:
            What was written. `method`, `reason`, `pause_s` and `stop_bytes` are those of the
            snapshot; `lost` are its LOST pages, which are zeros in the file. Memory that was left
            out (SHARED) is not in the file.

        Raises:
            SnapshotError: "registers" - the snapshot is not of a whole process, or was taken by a
                pyuffd that did not save them.
            SnapshotFormatError: a file was changed.
            ValueError: a path that is no file name.
            FileExistsError: EEXIST - something has this name.
            UffdOSError: ENOSPC, EDQUOT, EIO, EFBIG - writing failed; `filename` is the path.
            OSError: the folder cannot be written.
            After each of them there is no file.

        GIL: released while reading and writing.  Blocks: until it is written.
        """
        check_bools(durable=durable)
        return _core_from.write_core(
            self._checked(), check_path("path", path), durable=durable, progress=progress
        )

    # Working sets

    def working_sets(self) -> dict[str, WorkingSet]:
        """Return the recorded working sets by name.

        One whose file is damaged, or is of another snapshot, has a `WorkingSet.problem` and no
        pages.

        Raises:
            OSError: the directory cannot be read.
        """
        return _working_sets.load_all(self._checked())

    def working_set(self, name: str) -> WorkingSet | None:
        """Return a working set, as `working_sets` does; None if there is none with this name."""
        return _working_sets.load(self._checked(), name)

    def record(
        self,
        name: str,
        handler: Handler,
        memory: Iterable[tuple[RangeLike, int]],
        *,
        uffd: Userfaultfd | None = None,
        until: Until = "settled",
        stop: threading.Event | None = None,
    ) -> WorkingSet:
        """Note which pages of memory that has this snapshot's content are touched, and save them.

        Demand faults count, in the order of their first touch; what is filled without a fault does
        not, so nothing should be filled in the background meanwhile. Faults that the log already
        has count too, and are taken out of it. If there is a working set with this name, this is
        one more recording of it.

        Args:
            name: Up to 64 letters, digits, ".", "_" and "-".
            handler: It serves the memory, and was made with `fault_log=`.
            memory: Pairs of a region and the address in the snapshot whose content it has.
            uffd: The userfaultfd of the memory, if it is another one than the handler's.
            until: Seconds, or "settled": until less than 2 % of the pages were touched in the last
                second, and for a minute at most.
            stop: Ends it early; what was recorded by then is saved.

        Returns:
            The working set as it is now. If nothing was touched, it is not saved.

        Raises:
            ValueError: a bad name, no fault log, or memory that is no part of the snapshot, or that
                the handler does not serve.
            OSError: the file cannot be written.

        GIL: released while waiting.  Threads: may be called in a thread of its own.  Blocks: as
        `until` says.

        Example:
            Record what a program touches in ten seconds::

                with pyuffd.lazy(source, fault_log=1 << 20) as memory:
                    start_the_program(memory)
                    snapshot.record("startup", memory.handler, [(memory, address)], until=10)
        """
        return _recorded.record(
            self._checked(), name, handler, memory, uffd=uffd, until=until, stop=stop
        )

    # Restoring

    def restore(
        self,
        regions: Regions,
        *,
        mode: Mode = "auto",
        gaps: Gaps = "refuse",
        verify: Verify = "drain",
        handler: Handler | None = None,
        threads: int | None = None,
        rate: float | None = None,
        paused: bool = False,
        working_set: str | WorkingSet | None = None,
        record: str | None = None,
        record_until: Until = "settled",
    ) -> Restore:
        """Give memory the snapshot's content back, lazily: it is usable when this returns.

        A page that is touched is filled at once; threads in C fill the rest, in pieces of 1 MiB, so
        that a fault waits for one such piece at most. Chains of snapshots are looked through
        beforehand, in C. Pages of compressed snapshots are decompressed by Python, in a helper
        process.

        Args:
            regions: Where each part goes: pairs of a `SnapshotRegion`, or any address of the
                snapshot that is a multiple of 4096, and a region that was never touched; a mapping,
                or a list of pairs. A region gets as much as it is long.
            mode: "copy" fills pages of any kind of memory, which is independent of the files
                afterwards. "minor" fills one memfd, which all restores of this object map
                copy-on-write, so that they share the pages that they do not write. "map" maps the
                files themselves, copy-on-write: nothing is filled, and the files must stay as they
                are as long as the memory is used. Both replace the mapping of the region, which
                must be private anonymous memory of this process with small pages; the new one is
                readable and writable, and a page that is dropped (MADV_DONTNEED) has the snapshot's
                content again. A thread that touches the region before this returns waits until the
                new mapping is there; where a userfaultfd may be for user mode only, its system
                calls fail with EFAULT meanwhile, and where none can be opened, what it writes then
                may be lost. With "minor" a touch in the last moment makes this raise ValueError,
                and what it wrote is not kept. This object keeps the memfd of each part that was
                restored by "minor", until it is closed. "auto" is "map" where that is possible and
                the faster way (a local file system, the image in the page cache), otherwise "copy";
                `Restore.why` tells.
            gaps: What to do about pages whose content the snapshot does not have: LOST, SHARED, and
                ABSENT in mappings of files. "refuse" raises SnapshotError, "poison" makes an access
                raise SIGBUS, "zeros" makes them zeros. Pages that are ZERO, or ABSENT in other
                memory, are zeros.
            verify: When chunks are compared with their checksums: "first", before anything is
                restored; "drain", by the background before it fills them, so that a page that is
                touched earlier is not checked before; "no". Compressed chunks always are. With
                "map", the background only compares: `Restore.wait` tells of damage.
            handler: A running handler that serves the regions, "copy" only; with driver="process"
                if the snapshot is compressed. By default the restore has one of its own, which
                follows memory that is dropped or moved, but no forks.
            threads: How many fill; by default one for each CPU, 4 at most. While faults are
                answered, one of them.
            rate: Bytes a second that they fill at most. `Restore.rate` changes it.
            paused: Whether to begin with a pause, until `Restore.resume`.
            working_set: What is filled first, in its order: the name of a working set of this
                snapshot, or one. If it cannot be used, everything is filled as without it;
                `Restore.working_set` tells.
            record: Record the demand faults of this restore as a working set with this name, or as
                one more recording of it. Until that ends, the background fills the `working_set`
                and nothing else; "auto" is "copy" then. A handler of yours needs `fault_log=`.
            record_until: When the recording ends: seconds, or "settled", as for `record`.

        Raises:
            ValueError: bad arguments; memory that was not mapped at the instant, or that has pages,
                also of an earlier restore; a mode that the regions cannot have.
            SnapshotError: "gaps".
            SnapshotFormatError: a file was cut; with "first", a chunk was changed.
            RangeBusyError: memory that a handler, a tracker or another restore has registered.
            UffdOSError: what opening a userfaultfd, registering and mapping raise.

        Kernel: UFFDIO_COPY, UFFDIO_CONTINUE (Linux 5.14).  GIL: released.  Blocks: no, except with
        verify="first", and until the helper process runs that decompresses a compressed snapshot.
        """
        options = checked(
            mode=mode,
            gaps=gaps,
            verify=verify,
            handler=handler,
            threads=threads,
            rate=rate,
            paused=paused,
            working_set=working_set,
            record=record,
            record_until=record_until,
        )
        return Restore(self.path, self._shares, place(self._checked(), regions), options)

    def _shares(self) -> Shares:
        if self._all_shares is None:
            self._all_shares = Shares()
        return self._all_shares

    def close(self) -> None:
        """Close the files; restores that run keep what they need. A second call does nothing."""
        if self._all_shares is not None:
            self._all_shares.close()
        super().close()
