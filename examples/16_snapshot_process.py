"""Two snapshots of a program while it works, the second with what is different only.

The program was not prepared for it. What it had in memory at each instant is read back from the
files, and compared with what it says itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pyuffd import Process, RunState, Snapshot

# Writes its number of rounds into each page of 32 MiB, page by page.
PROGRAM = """
import ctypes, mmap, time
area = mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
number = 0
while True:
    number += 1
    for page in range(0, len(area), 4096):
        area[page : page + 8] = number.to_bytes(8, "little")
        if page % (1 << 20) == 0:
            time.sleep(0.002)
"""


def numbers(snapshot: Snapshot, address: int) -> set[int]:
    """Return the different numbers in the pages; at one instant there are two at most."""
    memory = snapshot.read(address, 32 << 20)
    return {int.from_bytes(memory[at : at + 8], "little") for at in range(0, len(memory), 4096)}


def main() -> None:
    """Take two snapshots and read them."""
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE)
    assert program.stdout is not None
    address = int(program.stdout.readline())
    try:
        with tempfile.TemporaryDirectory() as name, Process(program.pid) as target:
            folder = Path(name)
            first = Snapshot.take(target, folder / "first", max_stall_s=1)
            second = Snapshot.take(
                target, folder / "second", parent=folder / "first", max_stall_s=1
            )
            for report in (first, second):
                with Snapshot.open(report.path) as snapshot:
                    found = numbers(snapshot, address)
                    own = sum(r.length for r in snapshot.runs if r.state is RunState.DATA)
                print(
                    f"{report.method}: {own / 2**20:.0f} MiB, it was stopped for"
                    f" {report.pause_s * 1e3:.1f} ms; numbers in its pages: {sorted(found)}"
                )
                assert len(found) <= 2, "not of one instant"
            assert program.poll() is None, "the program runs on"
    finally:
        program.kill()
        program.communicate()


if __name__ == "__main__":
    main()
