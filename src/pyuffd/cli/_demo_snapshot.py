"""The demo's first half: an image of a running child's memory at one instant (layer L6)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyuffd
from pyuffd import Handler, HandlerStats, Region, RegisterMode, Userfaultfd
from pyuffd.cli._demo_work import (
    COUNTER,
    PAGE,
    REPLY_TIMEOUT_S,
    DemoError,
    WorkingSet,
    receive,
    replay,
    send,
)

# The image is taken after this many edits, or on a slow machine after this time.
EDITS_BEFORE = 100_000
WAIT_S = 2.0
POLL_S = 0.001
END_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Range:
    """Memory of another process."""

    start: int
    length: int
    page_size: int = PAGE


@dataclass(frozen=True)
class Snapshot:
    """The content of the image and how it was made.

    Attributes:
        length: Bytes of the image.
        edit: How many edits the child had made at the instant.
        image_edit: The number of edits that the image contains.
        digest: SHA-256 of the image.
        expected: SHA-256 of the memory's expected content: the files with the edits repeated.
        paused_s: The pause that the child measured.
        longest_s: The longest time between two other edits that the child measured.
        protect_s: How long write-protecting took, a part of the pause.
        save_s: From the end of the pause until the last page was saved.
        write_s: How long writing the file took afterwards.
        edits_meanwhile: Edits from the instant until the file was written.
        saved_behind: Pages saved in the background.
        faults: The handler's counters; None if the child had to wait for the whole image.
        refused: Why faults of system calls could not be handled, or "".
        untracked: Why the child had to wait for the whole image, or "".
    """

    length: int
    edit: int
    image_edit: int
    digest: str
    expected: str
    paused_s: float
    longest_s: float
    protect_s: float
    save_s: float
    write_s: float
    edits_meanwhile: int
    saved_behind: int
    faults: HandlerStats | None
    refused: str
    untracked: str

    @property
    def verified(self) -> bool:
        """Whether the image is the memory at that instant."""
        return self.digest == self.expected and self.image_edit == self.edit

    @property
    def saved_by_faults(self) -> int:
        """Pages saved just before the child wrote to them."""
        return self.faults.preserved_pages - self.saved_behind if self.faults else 0


class Child:
    """The running child process and the parent's end of its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        ours.settimeout(REPLY_TIMEOUT_S)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pyuffd.cli._demo_child", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C is for the parent; the child ends with its socket
                )
            except BaseException:
                ours.close()
                raise
        self.pid = self._process.pid

    def tell(self, **order: object) -> None:
        """Send an order; DemoError if the child has ended."""
        try:
            send(self._socket, order)
        except ConnectionError:
            raise DemoError(self._how_it_ended()) from None

    def reply(self, max_fds: int = 0) -> tuple[dict[str, object], list[int]]:
        """Return the next message and its descriptors; DemoError if the child has ended."""
        try:
            return receive(self._socket, max_fds)
        except (EOFError, ConnectionError):
            raise DemoError(self._how_it_ended()) from None

    def check_alive(self) -> None:
        """Raise DemoError if it has ended."""
        if self._process.poll() is not None:
            raise DemoError(self._how_it_ended())

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "the child process closed its socket"
        how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
        return f"the child process ended {how}"

    def close(self) -> None:
        """Let it end, and kill it if it does not."""
        self._socket.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except BaseException as error:
            self._process.kill()
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def take_snapshot(
    work: WorkingSet, path: Path | None, limit: int, seed: int, image: IO[bytes]
) -> Snapshot:
    """Start a child that edits `work`, and write its memory at one instant to a file.

    Args:
        work: The working set of `path` and `limit`, which the child reads again.
        path: As for `collect`.
        limit: As for `collect`.
        seed: The seed of the edits.
        image: An empty file for the image.

    Raises:
        DemoError: the child ended early, or read other content than `work`.
        OSError: the image cannot be written.
    """
    with contextlib.ExitStack() as stack:
        child = Child()
        stack.callback(child.close)
        child.tell(path=None if path is None else os.fspath(path), limit=limit, seed=seed)
        hello, memory, uffd = _shake_hands(child, stack)
        if hello["content"] != hashlib.sha256(work.content).hexdigest():
            raise DemoError(
                f"{work.origin} changed while it was read: use an --input that does not change"
            )
        _wait_for_edit(child, memory, EDITS_BEFORE)
        if uffd is not None:
            there = Range(int(str(hello["start"])), memory.length)
            taken = _save_while_it_runs(child, there, memory, uffd)
        else:
            taken = _save_while_it_waits(child, memory)
        began = time.perf_counter()
        image.write(taken.content)
        image.flush()
        write_s = time.perf_counter() - began
        edits_meanwhile = _edits(memory) - taken.edit
        child.tell(do="stop")
        report, _ = child.reply()
    return Snapshot(
        length=len(taken.content),
        edit=taken.edit,
        image_edit=int(COUNTER.unpack_from(taken.content, len(taken.content) - COUNTER.size)[0]),
        digest=hashlib.sha256(taken.content).hexdigest(),
        expected=hashlib.sha256(
            replay(work.content, len(taken.content), seed, taken.edit)
        ).hexdigest(),
        paused_s=int(str(report["paused_ns"])) / 1e9,
        longest_s=int(str(report["longest_ns"])) / 1e9,
        protect_s=taken.protect_s,
        save_s=taken.save_s,
        write_s=write_s,
        edits_meanwhile=edits_meanwhile,
        saved_behind=taken.saved_behind,
        faults=taken.faults,
        refused=str(hello["refused"]),
        untracked=str(hello["untracked"]),
    )


@dataclass(frozen=True)
class _Taken:
    content: bytearray
    edit: int
    protect_s: float
    save_s: float
    saved_behind: int
    faults: HandlerStats | None


def _shake_hands(
    child: Child, stack: contextlib.ExitStack
) -> tuple[dict[str, object], Region, Userfaultfd | None]:
    """Return the child's first message, its memory mapped here, and its userfaultfd."""
    hello, fds = child.reply(max_fds=2)
    for fd in fds:
        stack.callback(_close, fd, fds)
    memory = stack.enter_context(Region.file(fds[0], writable=False))
    uffd = None
    if len(fds) > 1:
        uffd = stack.enter_context(Userfaultfd.from_fd(fds[1]))
        fds.remove(uffd.fileno())
    return hello, memory, uffd


def _close(fd: int, owned: list[int]) -> None:
    if fd in owned:
        os.close(fd)


def _edits(memory: Region) -> int:
    """Return the current value of the counter in the child's memory."""
    return int(COUNTER.unpack(memory.read(memory.length - COUNTER.size, COUNTER.size))[0])


def _wait_for_edit(child: Child, memory: Region, number: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while _edits(memory) < number and time.monotonic() < deadline:
        child.check_alive()
        time.sleep(POLL_S)


def _pause(child: Child) -> int:
    """Stop the child between two edits; return how many it has made."""
    child.tell(do="pause")
    reply, _ = child.reply()
    return int(str(reply["edit"]))


def _save_while_it_runs(child: Child, there: Range, memory: Region, uffd: Userfaultfd) -> _Taken:
    """Write-protect the child's memory, let it continue, and save each page before its first write.

    A C thread resolves the faults. It reads the pages through `memory`, a mapping in this process
    that is not registered, so the thread cannot wait for itself.
    """
    content = bytearray(there.length)
    with Handler(uffd, owner_pid=child.pid, autostart=False) as handler:
        handler.serve(there, None, mode=RegisterMode.WP, preserve=content, local=memory)
        edit = _pause(child)
        began = time.perf_counter()
        handler.writeprotect(there)
        protect_s = time.perf_counter() - began
        handler.start()
        child.tell(do="go on")
        began = time.perf_counter()
        # Wait until at least one page has been saved by a fault, however fast the rest is saved.
        _wait_for_edit(child, memory, edit + 1)
        try:
            behind = handler.preserve(there, keep_protected=False)
        except pyuffd.ProcessGoneError:
            child.reply()
            raise
    # The handler has stopped, so the page of the last fault is saved too.
    save_s = time.perf_counter() - began
    return _Taken(content, edit, protect_s, save_s, behind // PAGE, handler.stats())


def _save_while_it_waits(child: Child, memory: Region) -> _Taken:
    edit = _pause(child)
    began = time.perf_counter()
    content = bytearray(memory.read())
    save_s = time.perf_counter() - began
    child.tell(do="go on")
    return _Taken(content, edit, 0.0, save_s, len(content) // PAGE, None)
