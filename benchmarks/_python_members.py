"""Members of pairs whose pages come from Python: ``python -m benchmarks._python_members ...``."""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import socket
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

from benchmarks import _python_sources as sources
from benchmarks._members import Answer, answer_rounds
from benchmarks._toucher import SEED, Touched, Toucher
from pyuffd import (
    BufferSource,
    CallableSource,
    Handler,
    Region,
    RegisterMode,
    Userfaultfd,
)

_PAGE = 4096
_SPIN_US = 50
_START_SAMPLES = 5


@dataclass(frozen=True)
class _Range:
    """Memory of another process."""

    start: int
    length: int
    page_size: int = _PAGE


def _region(pages: int) -> Region:
    """Return anonymous memory whose pages were used once and are missing again."""
    region = Region.anonymous(pages * _PAGE)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    region.fill(1)
    region.madvise(mmap.MADV_DONTNEED)
    return region


class _Process:
    """Latency of a missing fault with the process driver and a trivial function."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args
        self._order = toucher.order(args.pages, SEED)

    def round(self) -> Answer:
        args = self._args
        cpus = None if args.handler_cpu < 0 else [args.handler_cpu]
        spin_us = _SPIN_US if args.handler_cpu not in (-1, args.cpu) else None
        with (
            Userfaultfd() as uffd,
            _region(args.pages) as region,
            Handler(uffd, driver="process", cpus=cpus, spin_us=spin_us) as handler,
        ):
            handler.serve(region, CallableSource(sources.trivial))
            touched = self._toucher.run(region.start, self._order, page_size=_PAGE, cpu=args.cpu)
        return touched.wall_ns, touched.samples


class _Thread:
    """The same with the thread driver; the faults are those of a child process."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args

    def round(self) -> Answer:
        ours, theirs = socket.socketpair()
        with ours, theirs, ExitStack() as stack:
            child = os.fork()
            if child == 0:
                try:
                    self._touch(theirs)
                finally:
                    os._exit(1)
            stack.callback(_end, child)
            theirs.close()
            address, fds, _, _ = socket.recv_fds(ours, 8, 1)
            pages = self._args.pages
            region = _Range(int.from_bytes(address, "little"), pages * _PAGE)
            with Userfaultfd.from_fd(fds[0]) as uffd:
                handler = Handler(uffd, driver="thread", owner_pid=child)
                handler.serve(region, CallableSource(sources.trivial))
                handler.start()
                ours.sendall(b"!")
                body = b""
                while len(body) < 8 * (pages + 1):
                    body += ours.recv(1 << 20)
                handler.stop()
        numbers = array("Q", body)
        return numbers[0], numbers[1:]

    def _touch(self, sock: socket.socket) -> None:
        args = self._args
        order = self._toucher.order(args.pages, SEED)
        region = _region(args.pages)
        uffd = Userfaultfd()
        socket.send_fds(sock, [region.start.to_bytes(8, "little")], [uffd.fileno()])
        sock.recv(1)
        touched = self._toucher.run(region.start, order, page_size=_PAGE, cpu=args.cpu)
        sock.sendall(array("Q", [touched.wall_ns]).tobytes() + touched.samples.tobytes())
        signal.pause()


def _end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


class _Slow:
    """Threads that fault on pages whose source needs 1 ms; the samples are their latencies."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args
        self._order = toucher.order(args.pages, SEED)

    def round(self) -> Answer:
        args = self._args
        with (
            Userfaultfd() as uffd,
            _region(args.pages) as region,
            Handler(uffd, driver="process", workers=args.workers) as handler,
        ):
            handler.serve(region, CallableSource(sources.one_millisecond))
            touched = self._touch(handler, region)
        return touched.wall_ns, touched.samples

    def _touch(self, handler: Handler, region: Region) -> Touched:
        del handler
        return self._toucher.run(
            region.start, self._order, page_size=_PAGE, threads=self._args.threads
        )


class _Protected(_Slow):
    """Write-protect faults beside such faults; the samples are their latencies."""

    def _touch(self, handler: Handler, region: Region) -> Touched:
        with Region.anonymous(self._args.protected * _PAGE) as protected:
            protected.fill(1)
            handler.serve(protected, None, mode=RegisterMode.WP)
            handler.writeprotect(protected)
            slow = threading.Thread(target=super()._touch, args=(handler, region))
            slow.start()
            order = self._toucher.order(self._args.protected, SEED)
            touched = self._toucher.run(
                protected.start, order, page_size=_PAGE, write=True, pause_ns=1_000_000
            )
            if not slow.is_alive():
                raise RuntimeError("the slow faults ended first")
            slow.join()
            handler.unserve(protected)
        return touched


class _Adopted:
    """Missing faults of many userfaultfds served by one native thread."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher = toucher
        self._args = args
        self._order = toucher.order(args.pages, SEED)
        self._content = bytes([1]) * (args.pages * _PAGE)

    def round(self) -> Answer:
        args = self._args
        size = args.pages * _PAGE // args.fds
        content = memoryview(self._content)
        with ExitStack() as stack:
            uffd = stack.enter_context(Userfaultfd())
            memory = stack.enter_context(_region(args.pages))
            handler = stack.enter_context(Handler(uffd, driver="native", cpus=[args.cpu]))
            for offset in range(0, args.pages * _PAGE, size):
                other = stack.enter_context(Userfaultfd()) if args.fds > 1 else uffd
                part = Region.at(memory.start + offset, size, _PAGE)
                handler.serve(part, BufferSource(content[offset : offset + size]), uffd=other)
            touched = self._toucher.run(memory.start, self._order, page_size=_PAGE, cpu=args.cpu)
        return touched.wall_ns, touched.samples


class _Start:
    """Seconds from making a Handler to its first page."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        del toucher, args

    def round(self) -> Answer:
        samples = array("Q")
        for _ in range(_START_SAMPLES):
            with Userfaultfd() as uffd, Region.anonymous(_PAGE) as region:
                began_ns = time.perf_counter_ns()
                with Handler(uffd, driver="process") as handler:
                    handler.serve(region, CallableSource(sources.trivial))
                    region.touch()
                    samples.append(time.perf_counter_ns() - began_ns)
        return sum(samples), samples


_MEMBERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "process": (_Process, ("pages", "cpu", "handler_cpu")),
    "thread": (_Thread, ("pages", "cpu")),
    "slow": (_Slow, ("pages", "threads", "workers")),
    "protected": (_Protected, ("pages", "threads", "workers", "protected")),
    "adopted": (_Adopted, ("pages", "fds", "cpu")),
    "start": (_Start, ()),
}


def main() -> None:
    """Answer the harness until it closes standard input."""
    parser = argparse.ArgumentParser(prog="benchmarks._python_members")
    parser.add_argument("library")
    what = parser.add_subparsers(dest="what", required=True)
    for name, (_, numbers) in _MEMBERS.items():
        one = what.add_parser(name)
        for number in numbers:
            one.add_argument(number, type=int)
    args = parser.parse_args()
    member = _MEMBERS[args.what][0](Toucher(args.library), args)
    answer_rounds(cast("Callable[[], Answer]", member.round))


if __name__ == "__main__":
    main()
