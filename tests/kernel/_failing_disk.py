"""A folder on a disk with unreadable places (FUSE, served by a child process)."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.kernel._mounts import mounted
from tests.process._hung_files import Server, connect

_LOOKUP, _READ = 1, 15
_CACHED_S = 3600
_FOLDER = 2  # node numbers: 1 is the root, 2 the folder in it; files follow
NAME = "image"


class _Disk(Server):
    """Serves one folder of files; reading the bytes `bad` of one file fails with EIO."""

    def __init__(self, connection: int, folder: Path, file: str, bad: range) -> None:
        self._names = sorted(os.listdir(folder))
        self._files = [(folder / name).read_bytes() for name in self._names]
        self._fails_in, self._bad = self._names.index(file) + _FOLDER + 1, bad
        super().__init__(connection, b"")

    def _answer(self, op: int, node: int, body: bytes) -> tuple[int, bytes]:
        if op == _LOOKUP:
            name = body.split(b"\0")[0].decode()
            known = [NAME] if node == 1 else self._names if node == _FOLDER else []
            if name not in known:
                return errno.ENOENT, b""
            found = known.index(name) + node + 1
            entry = struct.pack("=QQQQII", found, 0, _CACHED_S, _CACHED_S, 0, 0)
            return 0, entry + self._attributes(found)
        if op == _READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            if (
                node == self._fails_in
                and offset < self._bad.stop
                and self._bad.start < offset + size
            ):
                return errno.EIO, b""
            return 0, self._files[node - _FOLDER - 1][offset : offset + size]
        return super()._answer(op, node, body)

    def _attributes(self, node: int) -> bytes:
        is_file = node > _FOLDER
        mode = stat.S_IFREG | 0o600 if is_file else stat.S_IFDIR | 0o700
        size = len(self._files[node - _FOLDER - 1]) if is_file else 0
        return struct.pack(
            "=QQQQQQIIIIIIIIII", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
        )


@contextlib.contextmanager
def failing_disk(folder: Path, file: str, bad: range) -> Iterator[str]:
    """Yield the path of a copy of a folder, where reading the bytes `bad` of a file fails."""
    connection = connect()
    options = {"fd": str(connection), "rootmode": "40000", "user_id": "0", "group_id": "0"}
    with mounted("fuse", **options) as root:
        server = _Disk(connection, folder, file, bad)
        try:
            yield f"{root}/{NAME}"
        finally:
            os.kill(server.pid, signal.SIGKILL)
            os.waitpid(server.pid, 0)
            os.close(connection)
