"""CRIU's image files: two magic numbers, then records, each a length and a protobuf message.

A file may come from anywhere: lengths are checked before they are used, and a file is never read
into memory as a whole.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from typing import Any

from pyuffd._errors import CriuError
from pyuffd.criu._schema import DecodeError

_COMMON_MAGIC = 0x54564319
PSTREE_MAGIC = 0x50273030
MM_MAGIC = 0x57492820
PAGEMAP_MAGIC = 0x56084025

_HEAD = struct.Struct("<II")
_SIZE = struct.Struct("<I")
# A process has at most 65,530 mappings, unless the limit was raised, of some 60 bytes each.
LARGEST_RECORD = 64 << 20


def records(path: str, magic: int) -> Generator[bytes, None, None]:
    """Yield the records of an image file, which is open until the generator is closed.

    Raises:
        CriuError: not such a file, or a record that does not fit into it.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _HEAD.size
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or _HEAD.unpack(head) != (_COMMON_MAGIC, magic):
            raise CriuError("image", f"{path} is not an image of the expected kind")
        while size_bytes := file.read(_SIZE.size):
            left -= _SIZE.size
            size = _SIZE.unpack(size_bytes)[0] if len(size_bytes) == _SIZE.size else -1
            if not 0 <= size <= min(left, LARGEST_RECORD):
                raise CriuError("image", f"{path}: a record of {size:#x} bytes does not fit")
            left -= size
            data = file.read(size)
            if len(data) != size:
                raise CriuError("image", f"{path} ends inside a record")
            yield data


def parsed(path: str, data: bytes, message: Any) -> Any:
    """Return a record as a message of this class."""
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise CriuError("image", f"{path}: a record cannot be decoded: {error}") from None
