"""Build the bare C programs and the faulting-thread library with plain ``gcc -O2``."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_C = _HERE / "c"
_CSRC = _HERE.parent / "csrc"
_COMPILE = ("gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{_CSRC}")


@dataclass(frozen=True)
class Programs:
    """Paths of the programs that were built."""

    arm: str
    attach: str
    fault: str
    fill: str
    rounds: str
    scan: str
    toucher: str
    tracked: str
    verbs: str
    writers: str


def build(directory: Path) -> Programs:
    """Compile everything into `directory`.

    Raises:
        FileNotFoundError: there is no gcc.
        subprocess.CalledProcessError: it failed; its messages are on standard error.
    """
    common = [str(_C / "bench.c"), str(_C / "toucher.c")]
    for name in ("arm", "attach", "fault", "fill", "rounds", "scan", "tracked", "verbs", "writers"):
        subprocess.run(
            [*_COMPILE, str(_C / f"{name}.c"), *common, "-o", str(directory / name)], check=True
        )
    toucher = directory / "libtoucher.so"
    subprocess.run(
        [*_COMPILE, "-shared", "-fPIC", str(_C / "toucher.c"), "-o", str(toucher)], check=True
    )
    return Programs(
        arm=str(directory / "arm"),
        attach=str(directory / "attach"),
        fault=str(directory / "fault"),
        fill=str(directory / "fill"),
        rounds=str(directory / "rounds"),
        scan=str(directory / "scan"),
        toucher=str(toucher),
        tracked=str(directory / "tracked"),
        verbs=str(directory / "verbs"),
        writers=str(directory / "writers"),
    )
