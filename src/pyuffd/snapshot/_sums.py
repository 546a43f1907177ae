"""Checksums of chunks, and their compression: by libraries where they are installed."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyuffd._errors import SnapshotFormatError, UffdError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Sum = Callable[["Buffer"], int]


def _xxh3() -> Sum:
    return importlib.import_module("xxhash").xxh3_64_intdigest  # type: ignore[no-any-return]


def _crc32() -> Sum:
    return zlib.crc32


# By the name in the manifest, the best first.
_SUMS: dict[str, Callable[[], Sum]] = {"xxh3_64": _xxh3, "crc32": _crc32}


def best_sum() -> tuple[str, Sum]:
    """Return the best checksum that is installed here."""
    for name, load in _SUMS.items():
        try:
            return name, load()
        except ImportError:
            continue
    raise AssertionError("the standard library has one")


def sum_named(path: str, name: object) -> Sum:
    """Return the checksum that a manifest names."""
    if not isinstance(name, str) or name not in _SUMS:
        raise SnapshotFormatError(path, f"the unknown checksum {name!r}")
    try:
        return _SUMS[name]()
    except ImportError:
        raise UffdError(
            f"{path}: checking it needs xxhash: pip install 'pyuffd[snapshot]'"
        ) from None


def compressor(level: int) -> Callable[[Buffer], bytes | memoryview]:
    """Return zstd's compression of one chunk."""
    return _zstandard().ZstdCompressor(level=level).compress  # type: ignore[no-any-return]


def decompressor() -> Callable[[bytes, int], bytes]:
    """Return zstd's decompression of one chunk, of at most a number of bytes."""
    zstandard = _zstandard()
    decompress = zstandard.ZstdDecompressor().decompress

    def limited(data: bytes, length: int) -> bytes:
        try:
            # The frame tells its length: one that lies is refused before memory is allocated.
            if zstandard.frame_content_size(data) != length:
                raise ValueError("the chunk has another length")
            return bytes(decompress(data, max_output_size=length))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None

    return limited


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise UffdError(
            "compressed snapshots need zstandard: pip install 'pyuffd[snapshot]'"
        ) from None
