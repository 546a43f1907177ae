"""What a signal handler's exception leaves that comes just as a `with` block ends is documented.

No code can prevent it: such an exception comes before the first instruction of `__exit__`, or in
its place. tests/process/test_interruptions.py shows that the last reference ends what is left.
"""

from __future__ import annotations

import inspect
import re

import pytest

import pyuffd
from pyuffd import criu

# These hold other threads or processes up, or cost them something.
OUTSIDE = {
    "DirtyTracker": pyuffd.DirtyTracker,
    "Handler": pyuffd.Handler,
    "Handler.hold": pyuffd.Handler.hold,
    "Handover": pyuffd.Handover,
    "LazyPages": criu.LazyPages,
    "LazyRegion": pyuffd.LazyRegion,
    "Stop": pyuffd.Process.stopped,
    "Restore": pyuffd.Restore,
    "Userfaultfd": pyuffd.Userfaultfd,
}
# These own memory, descriptors and files of this process, which nobody else waits for.
INSIDE = {
    *("DirtyRound", "FileSource", "Images", "Pagemap", "Process", "Region", "RemotePages"),
    *("Snapshot", "UnixListener"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_left_is_said(name: str) -> None:
    text = " ".join((inspect.getdoc(OUTSIDE[name]) or "").split())
    assert re.search(r"signal handler raises just as (the|its) (`with` )?block ends", text), text


def test_every_context_manager_is_in_a_list() -> None:
    """A new one needs the sentence, or holds nothing outside."""
    found = {
        name
        for module in (pyuffd, criu)
        for name in module.__all__
        if inspect.isclass(value := getattr(module, name)) and hasattr(value, "__exit__")
    }
    assert found - INSIDE - set(OUTSIDE) == set()
