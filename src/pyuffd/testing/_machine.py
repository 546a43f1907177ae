"""Huge pages and swap for one test session: reserved as root, and always given back.

The session's controller calls `reserve`. This starts a keeper process, which holds the resources
until the controller asks for their release or ends, even by SIGKILL. A state file under a lock has
one entry per keeper. So sessions can run at the same time, and the next keeper gives back what a
killed one held. Page counts are added and subtracted, never set, so other programs keep their
pages.

The keeper's command line is `python -m pyuffd.testing._machine CONTROLLER_PID HUGE_PAGES
SWAP_BYTES`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pyuffd.testing import _huge_pages

# On a file system that is emptied at boot, when the reservations end too.
STATE = Path("/run/pyuffd-machine.json")

# 128 MiB for each test process: source and destination areas of 32 MiB, an alias and a snapshot.
HUGE_PAGES_PER_WORKER = 64
SWAP_BYTES = 256 << 20
# For the keeper's answer: compacting memory for huge pages takes seconds on a full machine.
START_TIMEOUT_S = 60
# swapoff must read back all pages that are still swapped out.
STOP_TIMEOUT_S = 60

_SWAP_MAGIC = b"SWAPSPACE2"
_PAGE = 4096


@dataclass(frozen=True)
class Entry:
    """The resources of one keeper; pid and start time identify it even if the pid is reused.

    Attributes:
        pid: The keeper's process id.
        start_time: Field 22 of its /proc/PID/stat.
        huge_pages: Free pages added to the pool.
        swap_file: Path of the swap file.
        counted_in: Surplus pages that became part of the pool when it grew.
    """

    pid: int
    start_time: str
    huge_pages: int
    swap_file: str | None
    counted_in: int = 0


class Reservation:
    """The controller's end of a running keeper."""

    def __init__(self, keeper: subprocess.Popen[str], notes: str) -> None:
        self._keeper = keeper
        self.notes = notes
        self.pid = keeper.pid

    def release(self) -> None:
        """Give everything back, and wait until that is done."""
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.wait(STOP_TIMEOUT_S)
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()


def reserve(workers: int) -> Reservation | None:
    """Reserve huge pages and swap for this many test processes; return None if this user may not.

    With `PYUFFD_TESTS_RESERVE=no`, for a machine that is already prepared, it reserves nothing.
    """
    if os.environ.get("PYUFFD_TESTS_RESERVE") == "no":
        return None
    if os.geteuid() != 0 or not os.access(STATE.parent, os.W_OK):
        return None
    keeper = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "pyuffd.testing._machine"),
            *map(str, (os.getpid(), HUGE_PAGES_PER_WORKER * workers, SWAP_BYTES)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert keeper.stdout is not None
    ready, _, _ = select.select([keeper.stdout], [], [], START_TIMEOUT_S)
    return Reservation(keeper, keeper.stdout.readline().strip() if ready else "keeper is slow")


@contextlib.contextmanager
def use(*, alone: bool) -> Iterator[None]:
    """Use the machine together with other cases of this user, or exclusively."""
    with Path(tempfile.gettempdir(), f"pyuffd-machine-{os.geteuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _state() -> Iterator[list[Entry]]:
    """Yield the list of entries under the lock, and write it back."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(STATE, flags, 0o600), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            entries = [Entry(**entry) for entry in json.load(file)]
        except (ValueError, TypeError):
            entries = []
        try:
            yield entries
        finally:
            file.seek(0)
            file.truncate()
            json.dump([asdict(entry) for entry in entries], file)


def _start_time(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, or an empty string for a process that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # A zombie has ended too.
    return "" if fields[0] in "ZX" else fields[19]


def swap_header(length: int) -> bytes:
    """Return the first page of a version 1 swap area."""
    page = bytearray(_PAGE)
    struct.pack_into("<3I", page, 1024, 1, length // _PAGE - 1, 0)
    page[-len(_SWAP_MAGIC) :] = _SWAP_MAGIC
    return bytes(page)


def _swap_call(name: str, path: str) -> str:
    """Call swapon(2) or swapoff(2); return an error message or an empty string."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [path.encode()] + ([0] if name == "swapon" else [])
    if libc[name](*arguments) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def _swap_on(length: int) -> tuple[str | None, str]:
    """Make a swap file on a file system that allows one; return its path and a note."""
    refused = []
    for folder in dict.fromkeys(["/var/tmp", tempfile.gettempdir(), os.getcwd()]):
        try:
            fd, path = tempfile.mkstemp(prefix="pyuffd-swap-", dir=folder)
        except OSError as error:
            refused.append(f"{folder}: {error.strerror}")
            continue
        with open(fd, "wb") as file:
            try:
                os.posix_fallocate(fd, 0, length)
                file.write(swap_header(length))
                file.flush()
                os.fsync(fd)
                message = _swap_call("swapon", path)
            except OSError as error:
                message = os.strerror(error.errno or 0)
        if not message:
            return path, f"{length >> 20} MiB of swap"
        Path(path).unlink()
        refused.append(f"{folder}: {message}")
    return None, "no swap (" + "; ".join(refused) + ")"


def _give_back(entries: list[Entry], pid: int) -> None:
    """Remove a keeper's entry from the list, and give its resources back."""
    entry = next(entry for entry in entries if entry.pid == pid)
    entries.remove(entry)
    if entry.swap_file is not None:
        _swap_call("swapoff", entry.swap_file)
        Path(entry.swap_file).unlink(missing_ok=True)
    pages = entry.huge_pages
    if entries:
        # The other keepers' pages were added on top of these, which must not become surplus again.
        # So the last keeper gives them back.
        heir = entries[0]
        entries[0] = replace(heir, counted_in=heir.counted_in + entry.counted_in)
    else:
        pages += entry.counted_in
    if pages:
        _huge_pages.give_back(pages)


def _give_back_for_the_dead(entries: list[Entry]) -> None:
    for entry in list(entries):
        if _start_time(entry.pid) != entry.start_time:
            _give_back(entries, entry.pid)


def _keep(controller: int, huge_pages: int, swap_bytes: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        gone = os.pidfd_open(controller)
    except ProcessLookupError:
        return
    with _state() as entries:
        _give_back_for_the_dead(entries)
        swap_file, note = _swap_on(swap_bytes)
        pages, counted_in = _huge_pages.add(huge_pages)
        start_time = _start_time(os.getpid())
        entries.append(Entry(os.getpid(), start_time, pages, swap_file, counted_in))
    with contextlib.suppress(BrokenPipeError):
        print(f"reserved {pages} huge pages of 2 MiB, {note}", flush=True)
    # The controller closes stdin to ask for the release. If it is killed, a fork of it may still
    # hold the other end, so watch its pidfd too.
    select.select([sys.stdin, gone], [], [])
    with _state() as entries:
        _give_back(entries, os.getpid())


if __name__ == "__main__":
    _keep(*map(int, sys.argv[1:]))
