"""A file system (FUSE, in a child process) that stops answering on command."""

from __future__ import annotations

import mmap
import os
import stat
import struct
import time
import traceback

from tests.kernel._faults import fork

FUSE = "/dev/fuse"
_HEADER, _REPLY = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS = 1, 2, 3, 14, 15, 17
_RELEASE, _FLUSH, _INIT, _BATCH_FORGET = 18, 25, 26, 42
_HANGING = (_READ, _FLUSH, _GETATTR)
_CACHED_S = 3600
_ENOSYS = 38
REQUEST_BYTES = 1 << 18  # more than the kernel ever sends


def connect() -> int:
    """Open a connection for `mounted("fuse", fd=..., rootmode="40000", ...)`."""
    return os.open(FUSE, os.O_RDWR | os.O_CLOEXEC)


class Server:
    """Serves one file, under any name, until `hang`; optionally with direct reads."""

    def __init__(self, connection: int, data: bytes, *, direct: bool = False) -> None:
        self._connection, self._data, self._open_flags = connection, data, int(direct)
        self._flag = mmap.mmap(-1, mmap.PAGESIZE)
        self.pid = fork()
        if self.pid == 0:
            try:
                while True:
                    self._serve()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def hang(self) -> None:
        """Stop answering reads, closes and requests for the size."""
        self._flag[0] = 1

    def hold(self, *, on: bool = True) -> None:
        """Hold back the answers to reads, until it is off again."""
        self._flag[1] = on

    @property
    def holds(self) -> bool:
        """Whether a read waits for its answer; then its buffer is pinned."""
        return bool(self._flag[2])

    def _serve(self) -> None:
        request = os.read(self._connection, REQUEST_BYTES)
        _, op, unique, node, _, _, _, _ = _HEADER.unpack_from(request)
        if op in (_FORGET, _BATCH_FORGET) or (self._flag[0] and op in _HANGING):
            return
        error, answer = self._answer(op, node, request[_HEADER.size :])
        os.write(self._connection, _REPLY.pack(_REPLY.size + len(answer), -error, unique) + answer)

    def _answer(self, op: int, node: int, body: bytes) -> tuple[int, bytes]:
        if op == _INIT:
            sizes = (7, 31, 65536, 0, 16, 12, 131072, 1, 32, 0, 0)
            return 0, struct.pack("=IIIIHHIIHHI28x", *sizes)
        if op == _LOOKUP:
            entry = struct.pack("=QQQQII", 2, 0, _CACHED_S, _CACHED_S, 0, 0)
            return 0, entry + self._attributes(2)
        if op == _GETATTR:
            return 0, struct.pack("=QII", _CACHED_S, 0, 0) + self._attributes(node)
        if op == _OPEN:
            return 0, struct.pack("=QII", 1, self._open_flags, 0)
        if op == _READ:
            while self._flag[1]:
                self._flag[2] = True
                time.sleep(0.001)
            self._flag[2] = False
            _, offset, size = struct.unpack_from("=QQI", body)
            return 0, self._data[offset : offset + size]
        if op == _STATFS:
            return 0, struct.pack("=QQQQQIIII24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0)
        if op in (_RELEASE, _FLUSH):
            return 0, b""
        return _ENOSYS, b""

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFREG | 0o644 if node == 2 else stat.S_IFDIR | 0o755
        size = len(self._data)
        return struct.pack(
            "=QQQQQQIIIIIIIIII", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
        )
