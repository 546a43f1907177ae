"""The order and the priority in which a `Drain` does its work."""

from __future__ import annotations

import os
import threading

from pyuffd.snapshot._drain import Drain


def test_what_is_first_has_the_priority_of_the_program() -> None:
    """Somebody waits for it; pieces go behind all others."""
    found: list[tuple[str, int]] = []

    def note(what: str) -> int:
        found.append((what, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return 0

    own = os.getpriority(os.PRIO_PROCESS, 0)
    drain = Drain(note, lambda: None, ["piece"], threads=1, held=True)
    assert drain.first([lambda: note("first")] * 2).wait(10)
    drain.hold(False)
    assert drain.wait(10)
    assert found[:2] == [("first", own)] * 2
    assert found[2][0] == "piece"
    assert own < found[2][1] or own == found[2][1] == 19
