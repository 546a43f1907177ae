"""Take a snapshot of a guest's memory, and restore it lazily in another QEMU, where it goes on.

    python examples/qemu/restore.py [missing|minor|hugetlb]

A snapshot has the memory, QEMU's own migration the state of the devices (x-ignore-shared). The
second QEMU maps empty memory; each page is filled when the guest touches it. The guest's memory has
a number that it made up when it booted: if it still has it, and finds every page as it was left,
then its memory was restored.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from _guest import Guest

from pyuffd import (
    Feature,
    FileSource,
    Handler,
    OverlaySource,
    Process,
    Region,
    RegisterMode,
    RunState,
    Snapshot,
    ZeroSource,
)

BACKEND = {"missing": "memfd", "minor": "memfd", "hugetlb": "hugetlb"}
FEATURE = {
    "missing": Feature.MISSING_SHMEM,
    "minor": Feature.MISSING_SHMEM | Feature.MINOR_SHMEM,
    "hugetlb": Feature.MISSING_HUGETLBFS,
}


def save(folder: Path, backend: str) -> tuple[int, str]:
    """Boot a guest and save it; return the number of its last round, and its nonce."""
    with Guest(folder, "first", backend) as guest, Process(guest.pid) as qemu:
        guest.wait(20)
        guest.stop()
        ram = guest.ram(qemu)
        report = Snapshot.take(
            qemu, folder / "snapshot", ranges=[ram], method="stopped", shared="pause"
        )
        guest.save_state(folder / "state")
        last = guest.rounds()[-1]
    size = (folder / "state").stat().st_size
    print(f"round {last.number}: {report.bytes >> 10} KiB of memory, {size >> 10} KiB of state")
    return last


def content(snapshot: Snapshot) -> OverlaySource:
    """Return the guest's memory as a page source that needs no Python for a page."""
    (place,) = (place for region in snapshot.manifest["regions"] for place in region["places"])
    start, end, offset = place
    # Only runs tell what is zeros: the file `pages` may have anything there.
    zeros = [
        (run.start - start, run.length, ZeroSource())
        for run in snapshot.runs
        if start <= run.start < end and run.state is not RunState.DATA
    ]
    pages = FileSource(Path(snapshot.path) / "pages", offset)
    return OverlaySource([(0, None, pages), *zeros], gaps="zeros", length=end - start)


def restore(folder: Path, mode: str, number: int, nonce: str) -> None:
    """Let the guest go on in another QEMU, whose memory is filled page by page."""
    with ExitStack() as stack:
        snapshot = stack.enter_context(Snapshot.open(folder / "snapshot"))
        snapshot.verify()
        guest = stack.enter_context(Guest(folder, "second", BACKEND[mode], waits=True))
        qemu = stack.enter_context(Process(guest.pid))
        uffd = stack.enter_context(qemu.attach(FEATURE[mode]))
        ram = guest.ram(qemu)
        # If this program is killed, the helper process of "process" poisons what is missing: QEMU
        # ends then. With "native" the guest would read zeros and go on.
        handler = stack.enter_context(Handler(uffd, driver="process"))
        if mode == "minor":  # filled through a mapping of ours, then mapped by CONTINUE
            with open(guest.ram_file(ram), "r+b") as file:
                local = stack.enter_context(Region.file(file, ram.length))
            handler.serve(ram, content(snapshot), mode=RegisterMode.MINOR, local=local)
        else:
            handler.serve(ram, content(snapshot), mode=RegisterMode.MISSING)
        guest.load_state(folder / "state")
        guest.cont()
        rounds = guest.wait(3)
        faults = handler.stats().faults
        print(f"after 3 rounds: {faults['missing'] + faults['minor']} pages were touched")
        handler.load(ram)  # the rest, while the guest runs
        handler.stop()
        uffd.close()  # QEMU is as before now
        rounds = guest.wait(32)  # in 16 rounds the guest looks at all of its memory
    assert rounds[0] == (number + 1, nonce), "it went on where it was saved"
    assert {each.nonce for each in rounds} == {nonce}
    print(f"rounds {rounds[0].number} to {rounds[-1].number}: all pages are right, same nonce")


def main() -> None:
    """Save and restore."""
    mode = sys.argv[1] if len(sys.argv) > 1 else "missing"
    with tempfile.TemporaryDirectory() as name:
        number, nonce = save(Path(name), BACKEND[mode])
        restore(Path(name), mode, number, nonce)


if __name__ == "__main__":
    main()
