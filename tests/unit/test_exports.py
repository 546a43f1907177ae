"""Memoryviews that C is given: the garbage collector must find no export of one."""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyuffd import UffdError, _dirty_calls, _image_calls, _memory, _remote_calls, lowlevel
from tests._child import run_child

SOURCE = Path(_memory.__file__).parent
# Of bytes, which are in no circle.
BYTES = {("_image_calls.py", "packed"), ("_image_calls.py", "what"), ("_image_calls.py", "table")}


def exports() -> Iterator[tuple[str, str]]:
    """Yield the file and the argument of every from_buffer() that no `with` ends."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        ended = {
            id(item.context_expr)
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            for item in node.items
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or id(node) in ended:
                continue
            if ast.unparse(node.func) == "ffi.from_buffer":
                yield str(path.relative_to(SOURCE)), ast.unparse(node.args[-1])


def test_every_export_ends() -> None:
    assert set(exports()) == BYTES


def rows(*spans: int) -> memoryview:
    return memoryview(bytearray(b"".join(each.to_bytes(8, "little") for each in spans))).cast("Q")


CALLS: dict[str, Callable[[memoryview], object]] = {
    "read": lambda view: _remote_calls.read_ranges_to(2**22, view, 0, 1 << 20, None),
    "scan": lambda view: _image_calls.Pieces([(4096, 8192, 0, True)]).scan(-1, within=view),
    "round": lambda view: _dirty_calls.round_(-1, _dirty_calls.TrackedRows([]), 0, view),
    "count": lambda view: lowlevel.pagemap_count(view, -1, 0),
}


def collected_in_a_circle(name: str) -> None:
    def failed() -> None:
        view = rows(4096, 8192, 0)
        try:
            CALLS[name](view)
        except (UffdError, OSError, TypeError, OverflowError) as error:
            kept = [error]  # this frame is in its traceback
            kept.append(kept)  # type: ignore[arg-type]

    for _ in range(3):
        failed()
    gc.collect()


@pytest.mark.parametrize("name", CALLS)
def test_an_error_in_a_circle_is_collected(name: str) -> None:
    run_child(collected_in_a_circle, name)
