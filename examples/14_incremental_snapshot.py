"""Snapshots of memory that is written all the time: one in full, then what has changed.

`checkpoint` returns what was written since the last one and protects it again in one step, so that
no write falls between two snapshots. `hold` makes writers wait, so that what is copied is of one
instant; it is short, as only the changed pages are copied.
"""

from __future__ import annotations

import random
import threading
import time

from pyuffd import Feature, Handler, Region, RegisterMode, Userfaultfd

PAGE = 4096
PAGES = 2048
ROUNDS = 5
PAUSE_S = 0.02

Increment = list[tuple[int, bytes]]  # offsets and content


def snapshot(handler: Handler, region: Region) -> Increment:
    """Return what was written since the last snapshot, as it was at one instant."""
    with handler.hold(limit_s=5.0):
        written = handler.checkpoint(region).written
        return [(start, region.read(start, end - start)) for start, end, _ in written]


def restore(increments: list[Increment]) -> bytes:
    """Put increments on top of each other."""
    memory = bytearray(PAGES * PAGE)
    for increment in increments:
        for offset, content in increment:
            memory[offset : offset + len(content)] = content
    return bytes(memory)


def main() -> None:
    """Take some snapshots beside a thread that writes, and verify the last one."""
    over = threading.Event()
    with (
        Userfaultfd(features=Feature.PAGEFAULT_FLAG_WP) as uffd,
        Region.anonymous(PAGES * PAGE) as region,
        Handler(uffd) as handler,
    ):
        region.fill(1)
        handler.serve(region, None, mode=RegisterMode.WP)

        def work() -> None:
            chance = random.Random(1)
            while not over.is_set():
                region.write(chance.randrange(PAGES) * PAGE, chance.randbytes(64))

        increments = [snapshot(handler, region)]
        worker = threading.Thread(target=work)
        worker.start()
        for _ in range(ROUNDS):
            time.sleep(PAUSE_S)
            increments.append(snapshot(handler, region))
        over.set()
        worker.join()
        increments.append(snapshot(handler, region))
        for number, increment in enumerate(increments):
            size = sum(len(content) for _, content in increment)
            print(f"snapshot {number}: {size // PAGE} pages in {len(increment)} ranges")
        assert restore(increments) == region.read(0, region.length)
        print("the increments make up the memory")


if __name__ == "__main__":
    main()
