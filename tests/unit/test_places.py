"""The pieces of a "cow" snapshot that moved, against a model of one number for each page."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"
RUNS = 5


def test_moving_and_removing(tmp_path: Path) -> None:
    """Every page is where it was moved to, in as few pieces as possible, and memory is bounded."""
    program = tmp_path / "places"
    sources = [FOLDER / "places.c", CSRC / "snapshot" / "places.c"]
    options = ["-O1", "-g", "-Wall", "-Werror", "-fsanitize=undefined", f"-I{CSRC}"]
    subprocess.run(["cc", *options, "-o", program, *sources], check=True)
    for _ in range(RUNS):
        seed = os.environ.get("PYUFFD_SEED", str(random.randrange(1 << 31)))
        print("seed", seed)
        run = subprocess.run([program, seed], stdout=subprocess.PIPE, text=True, check=False)
        print(run.stdout)
        assert not run.returncode
        assert int(run.stdout.split()[0]) <= 2 * 512
