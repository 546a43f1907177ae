"""Keep an image of a guest's memory up to date while it runs, and compare it at the end.

python examples/qemu/track.py [anonymous|memfd|file|hugetlb]
"""

from __future__ import annotations

import sys
import tempfile

from _guest import Guest

from pyuffd import DirtyTracker, Process


def main() -> None:
    """Track a guest."""
    backend = sys.argv[1] if len(sys.argv) > 1 else "anonymous"
    with (
        tempfile.TemporaryDirectory() as folder,
        Guest(folder, "guest", backend) as guest,
        Process(guest.pid) as qemu,
    ):
        guest.wait(1)
        ram = guest.ram(qemu)
        image = bytearray(ram.length)
        with DirtyTracker(qemu, [ram]) as tracker:
            for gap in tracker.blind:
                print("cannot be seen:", gap.reason.value)
            qemu.copy(ram, image)
            for number in range(5):
                if number == 4:
                    guest.stop()
                else:
                    guest.wait(2)
                with tracker.collect() as round_:
                    for item in round_.dropped:
                        at = item.start - ram.start
                        image[at : at + item.length] = bytes(item.length)
                    for pages in (round_.written, round_.unsure):
                        qemu.copy(pages, image, base=ram.start)
                    round_.commit()
                print(f"round {number}: {round_.written.bytes >> 10} KiB were written")
        print("the image is the guest's memory:", image == qemu.read(ram.start, ram.length))


if __name__ == "__main__":
    main()
