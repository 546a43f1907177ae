"""A swap area that a case adds and can remove again; for cases that run alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyuffd.testing._machine import swap_header
from pyuffd.testing._need import Lack, needs_privilege

_PREFIX = "pyuffd-own-swap-"
_ZRAM = Path("/sys/class/zram-control")
_PREFER = 0x8000 | 0x7FFF  # SWAP_FLAG_PREFER and the highest priority
_libc = ctypes.CDLL(None, use_errno=True)


class Area:
    """A swap area that the kernel prefers to all others.

    Attributes:
        path: Its file or device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_on = False

    def on(self) -> None:
        """Call swapon(2)."""
        _checked("swapon", _libc.swapon(bytes(self.path), _PREFER))
        self._is_on = True

    def off(self) -> None:
        """Call swapoff(2), which reads every page back; may be called twice."""
        if self._is_on:
            self._is_on = False
            _checked("swapoff", _libc.swapoff(bytes(self.path)))


@contextlib.contextmanager
def own_area(length: int) -> Iterator[Area]:
    """Make a swap area, a file or else a zram device, and remove it at the end.

    Raises:
        Lack: neither is possible.
    """
    needs_privilege("CAP_SYS_ADMIN").check()
    with contextlib.ExitStack() as stack:
        area = _file(stack, length) or _zram(stack, length)
        if area is None:
            raise Lack(["swap-area"], "needs swap of its own; no file or zram device can be swap")
        yield area


def _file(stack: contextlib.ExitStack, length: int) -> Area | None:
    for folder in dict.fromkeys(["/var/tmp", tempfile.gettempdir(), os.getcwd()]):
        _remove_stale(Path(folder))
        try:
            fd, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
        except OSError:
            continue
        area = Area(Path(name))
        with open(fd, "wb") as file:
            try:
                os.posix_fallocate(fd, 0, length)
                file.write(swap_header(length))
                file.flush()
                area.on()
            except OSError:  # the file system does not support swap files
                area.path.unlink()
                continue
        stack.callback(area.path.unlink)
        stack.callback(area.off)
        return area
    return None


def _remove_stale(folder: Path) -> None:
    """Remove the areas of a killed process: these cases run alone, so no one else has any."""
    for path in folder.glob(_PREFIX + "*"):
        _libc.swapoff(bytes(path))
        path.unlink(missing_ok=True)


def _zram(stack: contextlib.ExitStack, length: int) -> Area | None:
    try:
        number = (_ZRAM / "hot_add").read_text().strip()
    except OSError:
        return None
    stack.callback((_ZRAM / "hot_remove").write_text, number)
    folder, area = Path(f"/sys/block/zram{number}"), Area(Path(f"/dev/zram{number}"))
    try:
        (folder / "disksize").write_text(str(length))
        stack.callback((folder / "reset").write_text, "1")
        with area.path.open("r+b", buffering=0) as device:
            device.write(swap_header(length))
            os.fsync(device.fileno())
        area.on()
    except OSError:
        return None
    stack.callback(area.off)
    return area


def _checked(what: str, result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)
