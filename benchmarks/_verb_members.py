"""pyuffd's side of the pairs of `bench_verbs`: ``python -m benchmarks._verb_members LIB ...``.

Also both sides of the post-copy pair, a Handler and a raw loop of `read_events` and `fill_copy`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import os
import random
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from benchmarks._members import Answer, answer_rounds
from benchmarks._toucher import Toucher
from pyuffd import (
    PROMISED,
    CallableSource,
    Feature,
    FileSource,
    Handler,
    Pagefault,
    Promised,
    Region,
    RegisterMode,
    Userfaultfd,
    ZeroSource,
)

_PAGE = 4096
_DIRTY_STEP = 10
_FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
_HEADER = struct.Struct("=QQ")
_ASK = struct.Struct("=Q")
#: Of the sender: small enough that a page that is asked for is soon sent.
_CHUNK = 256 << 10
_TOUCHED_EVERY = 64
#: How often the raw loop looks whether it is over.
_LOOK_S = 0.05


class _Verb:
    """A region that a Handler serves, and one verb done to it."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher, self._args = toucher, args
        stack = ExitStack()
        self._region = region = stack.enter_context(Region.anonymous(args.length))
        region.madvise(mmap.MADV_NOHUGEPAGE)
        uffd = stack.enter_context(Userfaultfd(features=_FEATURES))
        self._handler = handler = stack.enter_context(Handler(uffd, driver="native"))
        self._file = os.memfd_create("source")
        os.ftruncate(self._file, args.length)
        with mmap.mmap(self._file, args.length) as memory:
            for at in range(0, args.length, 2 << 20):
                memory[at : at + (2 << 20)] = b"\1" * min(2 << 20, args.length - at)
        self._source = mmap.mmap(self._file, args.length, prot=mmap.PROT_READ)
        self._stack = stack
        if args.verb == "checkpoint":
            region.fill(1)
            handler.serve(region, None, mode=RegisterMode.WP)
            handler.checkpoint(region)
            order = toucher.order(args.length // _PAGE, 0)
            self._dirty_pages = order[::_DIRTY_STEP]
        elif args.verb == "fill":
            handler.serve(region, ZeroSource())
        else:
            source = stack.enter_context(FileSource(self._file))
            handler.serve(region, source, mode=RegisterMode.MISSING | RegisterMode.WP)

    def round(self) -> Answer:
        samples = array("Q")
        for _ in range(self._args.repeats):
            samples.append(getattr(self, f"_{self._args.verb}")())
        return sum(samples), samples

    def _checkpoint(self) -> int:
        region = self._region
        self._toucher.run(region.start, self._dirty_pages, page_size=_PAGE, write=True, timed=False)
        begin_ns = time.perf_counter_ns()
        written = self._handler.checkpoint(region).written
        took_ns = time.perf_counter_ns() - begin_ns
        if len(written) != len(self._dirty_pages):
            raise RuntimeError(f"{len(written)} ranges, not {len(self._dirty_pages)}")
        return took_ns

    def _fill(self) -> int:
        args, region, handler = self._args, self._region, self._handler
        if handler.stats().filled_pages:
            handler.unserve(region)
            region.madvise(mmap.MADV_DONTNEED)
            handler.serve(region, ZeroSource())
        view = memoryview(self._source)
        begin_ns = time.perf_counter_ns()
        for at in range(0, args.length, args.piece):
            handler.fill(region, at, view[at : at + args.piece])
        return time.perf_counter_ns() - begin_ns

    def _evict(self) -> int:
        args, region, handler = self._args, self._region, self._handler
        pieces = array("Q")
        for at in range(0, args.length, 2 * args.piece):
            pieces.extend((at, at + args.piece))
        ranges = memoryview(pieces).cast("B").cast("Q", (len(pieces) // 2, 2))
        handler.populate(region, ranges=ranges)
        handler.unprotect(region)
        begin_ns = time.perf_counter_ns()
        evicted = handler.evict(region, write_back=self._file)
        handler.populate(region, ranges=ranges)
        took_ns = time.perf_counter_ns() - begin_ns
        if evicted != args.length // 2:
            raise RuntimeError(f"{evicted:#x} bytes, not {args.length // 2:#x}")
        return took_ns


class _PostCopy:
    """A region that arrives over a TCP socket while a thread touches pages of it."""

    def __init__(self, toucher: Toucher, args: argparse.Namespace) -> None:
        self._toucher, self._args = toucher, args
        self._memory = random.Random(1).randbytes(1 << 20) * (args.length >> 20)
        self._order = toucher.order(args.length // _PAGE, 1)[::_TOUCHED_EVERY]

    def round(self) -> Answer:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _send(theirs, self._memory)
            os._exit(0)
        theirs.close()
        features = Feature(0)
        with (
            ours,
            Userfaultfd(features=features) as uffd,
            Region.anonymous(self._args.length) as region,
        ):
            region.madvise(mmap.MADV_NOHUGEPAGE)
            receive: Callable[..., None] = _by_handler if self._args.way == "handler" else _raw
            toucher = threading.Thread(target=self._touch, args=(region,))
            begin_ns = time.perf_counter_ns()
            receive(ours, uffd, region, toucher)
            took_ns = time.perf_counter_ns() - begin_ns
            ours.shutdown(socket.SHUT_WR)
        os.waitpid(pid, 0)
        return took_ns, array("Q", [took_ns])

    def _touch(self, region: Region) -> None:
        self._toucher.run(region.start, self._order, page_size=_PAGE, timed=False)


def _send(sock: socket.socket, memory: bytes) -> None:
    """Push all of it, and what is asked for in between; then wait until the other end closes."""
    view = memoryview(memory)
    for offset in range(0, len(memory), _CHUNK):
        for page in _asked(sock):
            sock.sendall(_HEADER.pack(page, _PAGE) + memory[page : page + _PAGE])
        sock.sendall(_HEADER.pack(offset, _CHUNK))
        sock.sendall(view[offset : offset + _CHUNK])
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(4096):
        pass


def _asked(sock: socket.socket) -> Iterator[int]:
    """Yield the pages that were asked for by now; TCP may split a message anywhere."""
    with contextlib.suppress(BlockingIOError):
        while len(sock.recv(_ASK.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)) == _ASK.size:
            yield _ASK.unpack(sock.recv(_ASK.size))[0]


def _by_handler(
    sock: socket.socket, uffd: Userfaultfd, region: Region, toucher: threading.Thread
) -> None:
    def ask(offset: int, length: int) -> Promised:
        sock.sendall(_ASK.pack(offset))
        return PROMISED

    with Handler(uffd, driver="thread", stall_timeout_s=math.inf) as handler:
        handler.serve(region, CallableSource(ask))
        toucher.start()
        while header := sock.recv(_HEADER.size, socket.MSG_WAITALL):
            offset, length = _HEADER.unpack(header)
            handler.fill(region, offset, sock, length)
        toucher.join()
        if handler.stats().filled_pages != region.length // _PAGE:
            raise RuntimeError("pages are missing")


def _raw(sock: socket.socket, uffd: Userfaultfd, region: Region, toucher: threading.Thread) -> None:
    uffd.register(region)
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            if not select.select([uffd], [], [], _LOOK_S)[0]:
                continue
            for event in uffd.read_events():
                if isinstance(event, Pagefault):
                    offset = event.address // _PAGE * _PAGE - region.start
                    sock.sendall(_ASK.pack(offset))

    asker = threading.Thread(target=ask)
    asker.start()
    toucher.start()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while header := sock.recv(_HEADER.size, socket.MSG_WAITALL):
        offset, length = _HEADER.unpack(header)
        sock.recv_into(view, length, socket.MSG_WAITALL)
        uffd.fill_copy(region.start + offset, view[:length])
    toucher.join()
    over.set()
    asker.join()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks._verb_members")
    parser.add_argument("library")
    what = parser.add_subparsers(dest="what", required=True)
    verb = what.add_parser("verb")
    verb.set_defaults(member=_Verb)
    verb.add_argument("verb", choices=("checkpoint", "fill", "evict"))
    for name in ("length", "piece", "repeats"):
        verb.add_argument(name, type=int)
    post_copy = what.add_parser("post_copy")
    post_copy.set_defaults(member=_PostCopy)
    post_copy.add_argument("way", choices=("handler", "raw"))
    post_copy.add_argument("length", type=int)
    return parser.parse_args()


def main() -> None:
    """Answer the harness until it closes standard input."""
    args = _arguments()
    member: Any = args.member(Toucher(args.library), args)
    answer_rounds(member.round)


if __name__ == "__main__":
    main()
