"""Record the run that `draw.py` draws as the timeline of a snapshot (method cow).

    python docs/pictures/record_timeline.py

writes timeline.json beside it. It needs CAP_SYS_PTRACE; `draw.py` draws it afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from pyuffd import Process, Snapshot
from pyuffd._saver_calls import Saver
from pyuffd.snapshot import _capture, _cow

HERE = Path(__file__).resolve().parent
MIB = 96
# Some writes in the part that the sweep has not come to yet.
TARGET = f"""
import time
memory = bytearray({MIB} << 20)
for at in range(0, len(memory), 4096):
    memory[at] = at // 4096 % 250 + 1
print(flush=True)
number = 0
while True:
    for _ in range(20):
        number += 1
        memory[number * 7919 * 4096 % len(memory)] = number % 250 + 1
    time.sleep(0.001)
"""
SLICE_S = 0.004


def main() -> None:
    """Take one snapshot, and note when what happened."""
    events: list[tuple[str, float]] = []
    saved: list[tuple[float, int, int]] = []
    original = Saver.stats

    def stats(saver: Saver) -> object:
        found = original(saver)
        saved.append((time.perf_counter(), found.faults, found.swept))
        return found

    def note(name: str) -> None:
        events.append((name, time.perf_counter()))

    program = subprocess.Popen([sys.executable, "-c", TARGET], stdout=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.readline()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            Process(program.pid) as process,
            patch.object(_capture, "barrier", note),
            patch.object(_cow, "SLICE_S", SLICE_S),
            patch.object(Saver, "stats", stats),
        ):
            report = Snapshot.take(
                process, f"{folder}/one", method="cow", max_stall_s=1, durable=False
            )
    finally:
        program.kill()
        program.communicate()
    begin = events[0][1]
    (HERE / "timeline.json").write_text(
        json.dumps(
            {
                "mib": MIB,
                "pause_ms": round(report.pause_s * 1e3, 2),
                "longest_wait_ms": round(report.longest_wait_s * 1e3, 2),
                "events": {name: round((at - begin) * 1e3, 2) for name, at in events},
                "saved": [
                    [round((at - begin) * 1e3, 2), faults, swept] for at, faults, swept in saved
                ],
            },
            indent=None,
            separators=(",", ": "),
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
