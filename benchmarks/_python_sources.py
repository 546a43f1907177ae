"""Page sources in Python; the helper process finds them by name in this module."""

from __future__ import annotations

import time

_PAGE = bytes([1]) * 4096


def trivial(offset: int, length: int) -> bytes:
    """Return a page that is there already."""
    del offset, length
    return _PAGE


def one_millisecond(offset: int, length: int) -> bytes:
    """Return it after 1 ms."""
    del offset, length
    time.sleep(0.001)
    return _PAGE
