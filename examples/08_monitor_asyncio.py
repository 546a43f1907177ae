"""A monitor in another process: it receives a userfaultfd and serves its faults with asyncio.

This program starts itself again as the owner of the memory. The owner registers a region, sends
its userfaultfd over a socket and reads; the monitor fills each page when it is asked for, while
other tasks of its loop continue.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

from pyuffd import Handover, Pagefault, Region, Userfaultfd, recv_uffd, send_uffd

PAGES = 8
PAGE = 4096


def owner(fd: int) -> None:
    """Read memory that another process fills."""
    with Region.anonymous(PAGES * PAGE) as region, Userfaultfd() as uffd:
        uffd.register(region)
        with socket.socket(fileno=fd) as sock:
            send_uffd(sock, uffd, [region])
        letters = b"".join(region.read(page * PAGE, 1) for page in range(PAGES))
        print(f"process {os.getpid()} read {letters.decode()}", flush=True)


async def monitor(handover: Handover, process: asyncio.subprocess.Process) -> int:
    """Serve faults until the owner exits; return how many there were."""
    (region,) = handover.regions

    async def serve() -> int:
        served = 0
        async for event in handover.uffd.events():
            assert isinstance(event, Pagefault)  # no other event was asked for
            index = (event.address - region.start) // PAGE
            letter = bytes([ord("A") + index])
            # An event may come twice; the second finds the page there.
            served += handover.uffd.fill_copy(event.address, letter * PAGE).done // PAGE
        return served

    serving = asyncio.create_task(serve())
    await process.wait()
    handover.uffd.close()  # which ends the iteration
    return await serving


async def main() -> None:
    """Start the owner, receive its userfaultfd and serve its faults."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, str(fd), pass_fds=[fd], stdin=subprocess.DEVNULL
        )
        theirs.close()
        with await asyncio.to_thread(recv_uffd, ours) as handover:
            place = handover.regions[0]
            print(f"{place.length} bytes at {place.start:#x} of user {handover.uid}", flush=True)
            served = await monitor(handover, process)
    assert process.returncode == 0
    print(f"{served} pages filled by process {os.getpid()}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        owner(int(sys.argv[1]))
    else:
        asyncio.run(main())
