"""Record what a search touches in a restored index, and draw it: docs/pictures/working-set.png.

    python docs/pictures/working_set.py

A program holds a sorted index and a table of 64 MiB together. It is snapshotted and restored; a
reader looks up popular keys, by binary search in the index and then in the table. Needs root,
numpy and matplotlib.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

from pyuffd import Process, Region, Snapshot

HERE = Path(__file__).resolve().parent
KEYS = 1 << 22
LOOKUPS = 3000
PROGRAM = f"""
import mmap, numpy, sys
def memory():
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return numpy.frombuffer(mmap.mmap(-1, {KEYS} * 8, flags=anonymous), "<u8")
index, table = memory(), memory()
index[:] = numpy.arange({KEYS}, dtype="<u8") * 7
table[:] = index * 0x9E3779B97F4A7C15 | 1
print(index.ctypes.data, table.ctypes.data, flush=True)
sys.stdin.read()
"""


def look_up(index: numpy.ndarray, table: numpy.ndarray, key: int) -> int:
    """Return the entry of a key."""
    low, high = 0, len(index)
    while low + 1 < high:
        middle = (low + high) // 2
        if index[middle] <= key:
            low = middle
        else:
            high = middle
    return int(table[low])


def main() -> None:
    """Take the snapshot, record, draw."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    addresses = [int(word) for word in program.stdout.readline().split()]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/search"
        with Process(program.pid) as target:
            Snapshot.take(target, path, method="stopped", durable=False)
        program.communicate()
        generator = numpy.random.default_rng(1)
        popular = generator.zipf(1.3, LOOKUPS) * 104729 % KEYS
        with (
            Snapshot.open(path) as snapshot,
            Region.anonymous(KEYS * 8) as first,
            Region.anonymous(KEYS * 8) as second,
            snapshot.restore(
                dict(zip(addresses, (first, second), strict=True)), record="search"
            ) as restore,
        ):
            index = numpy.frombuffer(first.memoryview(), "<u8")
            table = numpy.frombuffer(second.memoryview(), "<u8")
            for place in popular:
                look_up(index, table, int(place) * 7)
            restore.wait()
            print(restore.why, restore.stats, restore.recorded)
            del index, table
        subprocess.run(
            [sys.executable, "-m", "pyuffd", "info", path, "--png", HERE / "working-set.png"],
            check=True,
        )


if __name__ == "__main__":
    main()
