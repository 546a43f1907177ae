"""The program of a `FaultingChild`: it makes a region, sends a userfaultfd, and runs orders.

Orders run in threads other than the one that reads them, so that an order which waits for a page
does not delay the next. The process ends when the test closes its end of the socket, even if
threads still wait.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import socket
import sys
import threading
import warnings
from typing import Any

from pyuffd import _memory
from pyuffd._abi import Feature, RegisterMode
from pyuffd._pages import round_down
from pyuffd._uffd import Userfaultfd
from pyuffd.handover import send_uffd
from pyuffd.regions import Region
from pyuffd.testing import _wire
from pyuffd.testing._memory_types import MEMORY_TYPES

PROT_NONE = 0  # not in the mmap module
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE


class Worker:
    """Runs orders on a region."""

    def __init__(self, connection: socket.socket, region: Region) -> None:
        self._connection = connection
        self._region = region
        self._sending = threading.Lock()
        self._orders: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}

    def take(self, order: dict[str, Any]) -> None:
        """Pass an order to its thread."""
        number = order["thread"]
        if number not in self._orders:
            self._orders[number] = queue.SimpleQueue()
            name = f"child-{number}"
            threading.Thread(target=self._work, args=(number,), name=name, daemon=True).start()
        self._orders[number].put(order)

    def _work(self, number: int) -> None:
        while True:
            order = self._orders[number].get()
            reply = {"id": order["id"], **self._outcome(order)}
            with self._sending:
                self._connection.sendall(_wire.packed(reply))

    def _outcome(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            args = [_wire.restored(arg) for arg in order["args"]]
            value = self._run(order["command"], args, order["options"], order["base"])
            return {"value": _wire.portable(value)}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return {"error": text, "errno": getattr(error, "errno", None)}

    def _run(self, command: str, args: list[Any], options: dict[str, Any], base: int | None) -> Any:
        if command == "fork":
            return self._fork(args, options, base)
        if command == "exit":
            os._exit(*args)
        start = self._region.start if base is None else base
        return getattr(self, f"do_{command}")(start, *args, **options)

    # Offsets count from the start of the region, or from the order's base.

    def do_read(self, start: int, offset: int, length: int) -> bytes:
        return _memory.read(start + offset, length)

    def do_write(self, start: int, offset: int, data: bytes) -> None:
        _memory.write(start + offset, data)

    def do_touch(self, start: int, offset: int, length: int = 1, *, write: bool = False) -> None:
        page_size = self._region.page_size
        first = round_down(start + offset, page_size)
        _memory.touch(first, start + offset + length - first, page_size, write=write)

    def do_madvise(self, start: int, advice: int, offset: int, length: int) -> None:
        _memory.madvise(start + offset, length, advice)

    def do_munmap(self, start: int, offset: int, length: int) -> None:
        _memory.munmap(start + offset, length)

    def do_mremap(self, start: int, offset: int, length: int) -> int:
        # Reserve address space, keep the part aligned to the page size and unmap the rest.
        page_size = self._region.page_size
        room = _memory.mmap(length + page_size, PROT_NONE, RESERVED)
        to = -(-room // page_size) * page_size
        if to > room:
            _memory.munmap(room, to - room)
        if behind := room + page_size - to:
            _memory.munmap(to + length, behind)
        _memory.move(start + offset, length, to, page_size)
        return to

    def _fork(self, args: list[Any], options: dict[str, Any], base: int | None) -> dict[str, Any]:
        """Fork, run a command in the child, and return how it ended."""
        # A file, not a pipe: another thread's fork may inherit a copy and outlive this one.
        result = os.memfd_create("fork-result", os.MFD_CLOEXEC)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
                pid = os.fork()
            if pid == 0:
                try:
                    # The test waits for the end of the stream: only the parent may keep it open.
                    self._connection.close()
                    order = {"command": args[0] if args else "exit", "args": args[1:] or [0]}
                    outcome = self._outcome({**order, "options": options, "base": base})
                    os.write(result, json.dumps(outcome).encode())
                finally:
                    os._exit(0)
            _, status = os.waitpid(pid, 0)
            text = os.pread(result, os.fstat(result).st_size, 0)
        finally:
            os.close(result)
        outcome = json.loads(text or "{}")
        return {"pid": pid, "returncode": os.waitstatus_to_exitcode(status), **outcome}


def prepare(order: dict[str, Any]) -> tuple[Region, Userfaultfd]:
    """Map and fill the region, and register it."""
    memory = MEMORY_TYPES[order["memory"]]
    region = memory.make(order["pages"] * memory.page_size)
    if content := _wire.restored(order["content"]):
        region.write(0, content)
    uffd = Userfaultfd(features=Feature(order["features"]), user_mode_only=order["user_mode_only"])
    if order["mode"]:
        uffd.register(region, mode=RegisterMode(order["mode"]))
    return region, uffd


def main() -> None:
    """Serve one test until it closes its end of the socket."""
    _memory.unguard()
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    connection = socket.socket(fileno=fd)
    buffer = bytearray()
    worker: Worker | None = None
    while data := connection.recv(1 << 16):
        buffer += data
        while (order := _wire.unpacked(buffer)) is not None:
            if worker is not None:
                worker.take(order)
                continue
            try:
                region, uffd = prepare(order)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                reply = {"error": text, "errno": getattr(error, "errno", None)}
                connection.sendall(_wire.packed(reply))
                return
            connection.sendall(_wire.packed({}))
            send_uffd(connection, uffd, [region], memory=True)
            # Keep no copy, so that our threads continue when the test closes the userfaultfd.
            uffd.close()
            worker = Worker(connection, region)
    # Not an ordinary exit: threads may wait in a fault.
    os._exit(0)


if __name__ == "__main__":
    main()
