"""Draw which page of a region was faulted in when, and how long each fault lasted.

`Handler.recent_faults()` holds the last faults of every CPU. Needs matplotlib
(`pip install pyuffd[plot]`); the picture goes to the file named on the command line.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from pyuffd import BufferSource, Handler, RecentFault, Region, Userfaultfd

PAGES = 256


def fault_in_some_order() -> tuple[Region, list[RecentFault]]:
    """Read a region in sequence, then backwards, then at random: a third of its pages each."""
    order = [
        *range(PAGES // 3),
        *range(2 * PAGES // 3, PAGES // 3, -1),
        *random.Random(1).sample(range(2 * PAGES // 3, PAGES), PAGES // 4),
    ]
    region = Region.anonymous(PAGES * 4096)
    content = bytes(range(256)) * 16 * PAGES
    with Userfaultfd() as uffd, Handler(uffd) as handler:
        handler.serve(region, BufferSource(content))
        for page in order:
            region.touch(page * 4096, 1)
    return region, handler.recent_faults()


def draw(region: Region, faults: list[RecentFault], path: Path) -> None:
    """One dot for each fault: time across, page up, colour for the latency."""
    first = min(fault.time_ns for fault in faults)
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    dots = axes.scatter(
        [(fault.time_ns - first) / 1e3 for fault in faults],
        [(fault.address - region.start) // 4096 for fault in faults],
        c=[fault.latency_ns / 1e3 for fault in faults],
        s=12,
    )
    figure.colorbar(dots, label="time to resolve, us")
    axes.set_xlabel("time, us")
    axes.set_ylabel("page")
    axes.set_title(f"the last {len(faults)} faults")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Fault in a region and draw its faults."""
    default = Path(tempfile.gettempdir()) / "fault-timeline.png"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    region, faults = fault_in_some_order()
    with region:
        draw(region, faults, path)
    print(f"{len(faults)} faults drawn in {path}")


if __name__ == "__main__":
    main()
