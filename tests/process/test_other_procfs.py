"""A process in a PID namespace whose /proc is that of another one, as `unshare --pid` leaves it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from pyuffd import (
    DirtyTracker,
    Feature,
    Handler,
    Pagemap,
    Process,
    Region,
    RegisterMode,
    UffdOSError,
    Userfaultfd,
)
from pyuffd.testing import needs, needs_privilege
from tests._child import limit_s

ROOT = Path(__file__).parents[2]
PAGE = 4096
MODE = RegisterMode.MISSING | RegisterMode.WP

LOOKERS = (Process, Pagemap)

pytestmark = [needs_privilege("CAP_SYS_ADMIN"), needs(Feature.PAGEFAULT_FLAG_WP)]


def refuses() -> None:
    """What is told by an id would be that of another process: a tracker would see no write."""
    with Region.anonymous(PAGE) as region:
        makers = (lambda: DirtyTracker(region), *(partial(one, os.getpid()) for one in LOOKERS))
        for make in makers:
            with pytest.raises(UffdOSError) as caught:
                make()
            assert caught.value.errno == errno.ENOENT
            assert "another PID namespace" in caught.value.hint


def serves() -> None:
    """The page table of this process is its own."""
    content = bytearray(b"old".ljust(PAGE) * 2)
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(2 * PAGE) as region,
        Handler(uffd) as handler,
    ):
        handler.serve(region, content, mode=MODE)
        region.write(0, b"one")
        assert handler.checkpoint(region).written.bytes == PAGE
        region.write(PAGE, b"two")
        assert [row.start for row in handler.checkpoint(region).written] == [PAGE]
        assert handler.evict(region, write_back=None) == 2 * PAGE
        assert region.read(0, 3) == b"old"


def elsewhere(name: str, victim: int) -> None:
    """Call a function in a process whose id is in /proc that of the victim."""
    with suppress(OSError):  # without CONFIG_CHECKPOINT_RESTORE it is that of any other process
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(victim - 1))
    child = os.fork()
    if not child:
        assert os.readlink("/proc/self") != str(os.getpid())
        globals()[name]()
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.parametrize("name", ["refuses", "serves"])
def test_in_a_namespace_with_the_proc_of_another(name: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            program = f"from {__name__} import *; elsewhere({name!r}, {victim.pid})"
            command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", program]
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, env=env, check=True, timeout=limit_s(60))
        finally:
            victim.kill()
