"""The text of failures: addresses as page numbers, long lists cut, alternatives once (layer L5)."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Mapping, Sequence

from pyuffd._abi import PageBit
from pyuffd._events import Pagefault
from pyuffd._memory import Interrupted
from pyuffd.conformance._raw import Answer
from pyuffd.regions import Region

MOST = 10  # addresses, or items of a list, in one sentence
_ADDRESS = re.compile(r"\b0x[0-9a-f]{5,16}\b")
_LIST = re.compile(r"\[[^\[\]]*\]")
LETTERS = (
    ("P", PageBit.PRESENT),
    ("S", PageBit.SWAP),
    ("F", PageBit.FILE),
    ("W", PageBit.UFFD_WP),
    ("X", PageBit.MMAP_EXCLUSIVE),
)


class Mismatch(AssertionError):
    """The kernel did something that the case does not accept; the text says what was seen."""


def letters(bits: int) -> str:
    """Return pagemap bits as `P-FWX`: present, swap, file, write-protected, exclusive."""
    return "".join(letter if bits & bit else "-" for letter, bit in LETTERS)


def show(value: object) -> str:
    """Return a value as a report shows it."""
    match value:
        case bool() | None:
            return str(value)
        case OSError():
            return f"{errno.errorcode.get(value.errno or 0, value.errno)} ({type(value).__name__})"
        case Interrupted():
            name = signal.Signals(value.number).name
            return f"{name} (si_code {value.code}, address {value.address:#x})"
        case Pagefault():
            return f"message {int(value.flags)} ({value.flags!r}) at {value.address:#x}"
        case list():
            return f"[{', '.join(show(item) for item in value)}]"
        case int() if value > 0xFFFF:
            return f"{int(value):#x}"
        case bytes() if len(value) > 16:
            return f"{value[:16].hex(' ')} ... ({len(value)} bytes)"
        case bytes():
            return value.hex(" ")
        case _:
            return str(value) if isinstance(value, Answer) else repr(value)


def places(text: str, regions: Sequence[Region]) -> str:
    """Replace addresses inside regions by page numbers, and cut lists to ten items.

    If there are several regions, their number is added: `page 3 of region 1`.
    """
    text = _LIST.sub(lambda match: _cut(match[0]), text)
    return _ADDRESS.sub(lambda match: _place(int(match[0], 16), regions) or match[0], text)


def _cut(text: str) -> str:
    items = text[1:-1].split(", ")
    if len(items) <= MOST:
        return text
    return f"[{', '.join(items[:MOST])}, ... and {len(items) - MOST} more]"


def _place(address: int, regions: Sequence[Region]) -> str:
    for number, region in enumerate(regions):
        # The address after a region counts too, as the end of a range.
        if not region.closed and region.start <= address <= region.start + region.length:
            page, rest = divmod(address - region.start, region.page_size)
            where = f"byte {rest:#x} of page {page}" if rest else f"page {page}"
            return f"{where} of region {number}" if len(regions) > 1 else where
    return ""


def alternatives(by_name: Mapping[str, str]) -> str:
    """Return what the variants predict, each value once: `0 (usual, old) or 22 (refused)`."""
    names: dict[str, list[str]] = {}
    for name, value in by_name.items():
        names.setdefault(value, []).append(name)
    return " or ".join(f"{value} ({', '.join(who)})" for value, who in names.items())
