"""In a guest: run cases of the conformance suite without pytest, and send their results.

Results go to the console line by line, as JSON after a mark, because a case may end the guest at
any time.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyuffd.conformance import Report, load
from pyuffd.conformance._kmsg import Kmsg
from pyuffd.conformance.plugin import records
from pyuffd.testing._need import kernel_features
from tests.vm import _cases

PLAN = Path("/vm/plan.json")
MARK = "suite: "


def main() -> None:
    """Run the tests of the plan."""
    plan = json.loads(PLAN.read_text())
    report = Report.of_this_kernel(kernel_features())
    with contextlib.closing(Kmsg()) as kmsg:
        say(kind="kernel", kernel=report.kernel, features=report.features, log=kmsg.readable)
        for test, result in _cases.results(plan["tests"]):
            found = records(kmsg, load()[_cases.split(test)[0]])
            say(kind="result", result=asdict(result), records=found)
    say(kind="done")


def say(**what: Any) -> None:
    """Report to the host."""
    sys.stdout.write(f"\n{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
