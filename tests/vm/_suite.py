"""Run the conformance suite in guests without pytest, which is slow on an emulated CPU."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyuffd.conformance import Report, load
from pyuffd.conformance import Result as CaseResult
from pyuffd.conformance._report import FAILED
from pyuffd.conformance._writing import write_report
from pyuffd.conformance.plugin import Gathering
from tests.vm import _cases, _run, _suite_guest

# For a distribution's kernel whose clock counts instructions.
SCALE = 4.0
BOOT_S = 100.0
RUN_S = 3600.0
# A case takes less time, or prints that it takes more; a kernel that hangs prints nothing.
QUIET_S = 60.0
EVERY = 200


@dataclass
class Run:
    """The result of the suite on a kernel.

    Attributes:
        report: The report; None if not even the first guest ran the suite.
        sentence: What went wrong, or "".
        boot_s: Seconds until user space was up.
        wall_s: Seconds in total.
    """

    report: Report | None
    sentence: str = ""
    boot_s: float = 0.0
    wall_s: float = 0.0


def choose() -> list[str]:
    """Return the ids of all cases that run by default."""
    return [name for case in load().values() if not case.is_slow for name in case.ids]


def run(kernel: Path, folder: Path, tests: Sequence[str], until: float = math.inf) -> Run:
    """Run tests on a kernel; after one that ends the guest, boot again for the others.

    Args:
        kernel: The kernel to boot.
        folder: Where the files of the run go, including report.json and report.html.
        tests: The ids of the tests.
        until: When it must end, by `time.monotonic`; tests that have not run are not in the report.
    """
    gathered = Gathering()
    found = Run(None)
    left = list(tests)
    while left:
        guest = _run.Guest(
            kernel,
            folder,
            accel=_run.accel(1),
            scale=SCALE,
            boot_s=BOOT_S,
            run_s=RUN_S,
            counted=True,
            quiet_s=QUIET_S,
            until=until,
            files={str(_suite_guest.PLAN): json.dumps({"tests": left}).encode()},
            show=_progress(kernel.name, len(left)),
        )
        ended = guest.run([sys.executable, "-m", "tests.vm._suite_guest"])
        lines = said((ended.folder / "console.log").read_text(errors="replace"))
        found.boot_s = found.boot_s or ended.boot_s
        found.wall_s += ended.wall_s
        if not any(line["kind"] == "kernel" for line in lines):
            found.sentence = ended.sentence or "the guest ran nothing"
            break
        found.report = gathered.report
        left = left[take(gathered, lines) :]
        if time.monotonic() > until:
            found.sentence = f"{len(left)} tests had no time" if left else ""
            break
        if left:
            # The guest had reached this case, so the case ended it, not the machine.
            test = left.pop(0)
            gathered.report.results[test] = ended_by(test, ended.sentence)
    if found.report is not None:
        gathered.sort()
        write_report(found.report, str(folder / "report.json"))
    return found


def said(console: str) -> list[dict[str, Any]]:
    """Return what the guest has reported."""
    found = []
    for line in console.splitlines():
        _, mark, text = line.partition(_suite_guest.MARK)
        if mark:
            try:
                found.append(json.loads(text))
            except ValueError:  # a kernel message is in between, or the guest ended in the line
                continue
    return found


def take(gathered: Gathering, lines: Sequence[dict[str, Any]]) -> int:
    """Put what a guest has reported into a report; return the number of tests."""
    count = 0
    features, is_readable = 0, True
    for line in lines:
        if line["kind"] == "kernel":
            gathered.report.kernel = line["kernel"]
            features, is_readable = line["features"], line["log"]
        elif line["kind"] == "result":
            log = {"readable": is_readable, "records": line["records"]}
            gathered.add({**line["result"], "features": features, "kernel": log})
            count += 1
    return count


def ended_by(test: str, sentence: str) -> CaseResult:
    """Return the result of a case during which the guest ended."""
    name, memory = _cases.split(test)
    text = f"the guest ended: {sentence or 'without a word'}"
    return CaseResult(test, name, memory, load()[name].summary, FAILED, text)


def _progress(name: str, of: int) -> Any:
    count = 0

    def show(data: bytes) -> None:
        nonlocal count
        before = count
        count += data.count(b'"kind": "result"')
        if count // EVERY != before // EVERY:
            print(f"kernels: {name}: {count} of {of}", flush=True)

    return show
