"""A program's own data, saved at one instant and restored lazily, with what it needs at first.

The first restore records which pages are touched; the second one fills these before the others, so
that nobody waits for them.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from pyuffd import Region, Restore, Snapshot

PAGE = 4096
LENGTH = 32 << 20
NEEDED = random.Random(1).sample(range(LENGTH // PAGE), 300)


def begin(memory: Region) -> None:
    """Touch what a program touches when it starts."""
    for page in NEEDED:
        assert int.from_bytes(memory.read(page * PAGE, 8), "little") == page + 1


def restored(snapshot: Snapshot, where: int, record: str | None, first: str | None) -> int:
    """Restore into new memory and begin; return how many pages were waited for."""
    with (
        Region.anonymous(LENGTH) as memory,
        snapshot.restore({where: memory}, mode="copy", record=record, working_set=first) as restore,
    ):
        if first is not None:
            restore.wait_hot()
        begin(memory)
        waited = restore.stats.faults
        finish(restore)
        assert memory.read() == snapshot.read(where, LENGTH)
        return waited


def finish(restore: Restore) -> None:
    """End the recording, if there is one, and wait for the rest."""
    restore.stop_recording()
    restore.wait()


def main() -> None:
    """Save, restore and record, restore again."""
    with tempfile.TemporaryDirectory() as name, Region.anonymous(LENGTH) as data:
        for page in range(LENGTH // PAGE):
            data.write(page * PAGE, (page + 1).to_bytes(8, "little"))
        saved = Snapshot.take(data, Path(name) / "saved", max_stall_s=1)
        print(f"{saved.bytes >> 20} MiB saved; the pause was {saved.pause_s * 1e3:.1f} ms")
        with Snapshot.open(saved.path) as snapshot:
            without = restored(snapshot, data.start, "start", None)
            print(f"restored: {without} pages were waited for, and recorded")
            with_set = restored(snapshot, data.start, None, "start")
            print(f"restored with the working set: {with_set} pages were waited for")
            assert with_set < without


if __name__ == "__main__":
    main()
