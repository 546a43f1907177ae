"""Track what another process writes, without preparing it, and copy what it has written."""

from __future__ import annotations

import subprocess
import sys

from pyuffd import DirtyTracker, Process

PROGRAM = """
import mmap
memory = mmap.mmap(-1, 256 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
number = 0
print("ready", flush=True)
while input():
    number += 1
    for page in range(0, 256, 16):
        memory[page * 4096] = number
    print("written", flush=True)
"""

with subprocess.Popen(
    [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
) as child:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.readline()
    with Process(child.pid) as target, DirtyTracker(target) as tracker:
        print(f"{len(target.mappings())} mappings, method {tracker.method}")
        for gap in tracker.blind[:3]:
            print("  blind:", gap)
        for number in range(3):
            print("go", file=child.stdin, flush=True)
            child.stdout.readline()
            with tracker.collect() as round_:
                pages = bytearray(round_.written.bytes)
                copied = target.copy(round_.written, pages)
                print(
                    f"round {number}: {round_.written.pages()} pages in {len(round_.written)}"
                    f" ranges, {len(round_.layout)} changes of the layout,"
                    f" {copied.bytes == len(pages)}"
                )
                round_.commit()
    print("\n", file=child.stdin, flush=True)
    child.kill()
print("the process was left as it was")
