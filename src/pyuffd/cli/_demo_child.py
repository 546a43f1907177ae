"""The demo's child process: keeps a working set in memory and edits it constantly (layer L6).

Messages in both directions are JSON on a SOCK_SEQPACKET socket, whose descriptor is the first
argument. The child ends when told to, or when the other end of the socket is closed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import sys
import time
from pathlib import Path

import pyuffd
from pyuffd import Feature, Region
from pyuffd.cli._demo_work import collect, edit_forever, open_userfaultfd, receive, send

TRACKING = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM


def main() -> None:
    """Follow the orders on the socket until it is closed."""
    with (
        socket.socket(fileno=int(sys.argv[1])) as parent,
        contextlib.suppress(EOFError, ConnectionError),
    ):
        order, _ = receive(parent)
        path, limit, seed = order["path"], order["limit"], order["seed"]
        assert isinstance(limit, int)
        assert isinstance(seed, int)
        work = collect(Path(str(path)) if path is not None else None, limit)
        with Region.memfd(work.length, seal=True) as region:
            region.write(0, work.content)
            _hand_over(parent, region, hashlib.sha256(work.content).hexdigest())
            with region.memoryview() as memory:
                _edit(parent, memory, work.content, seed)


def _hand_over(parent: socket.socket, region: Region, digest: str) -> None:
    """Send the memory and a userfaultfd of this process, and keep no copy of the latter.

    Without a copy here, this process never waits in a fault for long: the kernel lets it continue
    when the last descriptor is closed, which is at the latest when the parent ends.
    """
    message: dict[str, object] = {
        "start": region.start,
        "length": region.length,
        "content": digest,
        "refused": "",
        "untracked": "",
    }
    assert region.fd is not None
    try:
        uffd, message["refused"] = open_userfaultfd(TRACKING)
    except pyuffd.UnsupportedFeatureError as error:
        message["untracked"] = error.hint
        send(parent, message, [region.fd])
        return
    with uffd:
        send(parent, message, [region.fd, uffd.fileno()])


def _edit(parent: socket.socket, memory: memoryview, content: bytes, seed: int) -> None:
    """Edit until told to stop; measure the time from the end of one edit to the end of the next."""
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    clock = time.perf_counter_ns
    paused = longest = 0
    pausing = False
    last = clock()
    for made in edit_forever(memory, content, seed):
        now = clock()
        if pausing:
            paused, pausing = now - last, False
        elif now - last > longest:
            longest = now - last
        last = now
        if poll.poll(0):
            order, _ = receive(parent)
            if order["do"] == "stop":
                send(parent, {"edit": made, "paused_ns": paused, "longest_ns": longest})
                return
            send(parent, {"edit": made})
            receive(parent)
            pausing = True


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    main()
