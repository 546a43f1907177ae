"""Programs that end without stopping their handlers: they end, whatever state these are in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyuffd import Feature
from pyuffd.testing import needs
from pyuffd.testing._needs import needs_kernel_faults
from pyuffd.testing._run import SCALE
from tests._child import crowd

pytestmark = [needs_kernel_faults(), needs(Feature.SIGBUS)]

MAKE = """
import sys, threading, warnings
warnings.simplefilter("ignore")
from pyuffd import CallableSource, Feature, Handler, Region, Userfaultfd, ZeroSource

def read(offset, length):
    return b"x" * length

def make(driver, start):
    uffd = Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))
    region = Region.anonymous(8192)
    handler = Handler(uffd, driver=driver)
    asks = driver in ("thread", "process")
    handler.serve(region, CallableSource(read) if asks else ZeroSource())
    if start:
        handler.start()
        region.read(0, 1)
    return uffd, region, handler
"""
DRIVERS = ("native", "inline", "thread", "process")
PROGRAMS = {
    "global": "kept = [make(driver, {start}) for driver in {drivers}]",
    # The last traceback keeps the frame, until the interpreter has no threads any more.
    "raised": """
def main():
    kept = [make(driver, {start}) for driver in {drivers}]
    raise LookupError("on purpose")

if __name__ == "__main__":
    main()
""",
    "circle": """
class Holds:
    pass

for driver in {drivers}:
    one = Holds()
    one.itself, one.made = one, make(driver, {start})
del one
""",
}


@pytest.mark.crossing
@pytest.mark.parametrize("start", [False, True], ids=["unstarted", "started"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_ends(program: str, start: bool, tmp_path: object) -> None:
    path = f"{tmp_path}/program.py"
    with open(path, "w", encoding="utf-8") as file:
        file.write(MAKE + PROGRAMS[program].format(drivers=DRIVERS, start=start))
    ended = subprocess.run(
        [sys.executable, path], stderr=subprocess.PIPE, text=True, timeout=30 * SCALE * crowd()
    )
    assert ended.returncode == (program == "raised"), ended.stderr
