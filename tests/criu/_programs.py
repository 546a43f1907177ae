"""Start the programs of the tests: a process that is "restored", and the server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pyuffd.criu import LazyPages, RestoreReport
from pyuffd.testing._run import SCALE
from tests.criu._images import LAZY, PAGE, PRESENT, write_mappings, write_pagemap, write_tree

ROOT = Path(__file__).resolve().parents[2]
PID = 77
ZOMBIE = 78
LIMIT_S = 60.0


class Client:
    """A process of tests/criu/_client.py."""

    def __init__(self, *pages: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.criu._client", *map(str, pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._timer = threading.Timer(LIMIT_S * SCALE, self._process.kill)
        self._timer.start()
        self.starts: list[int] = self._answer()
        self.pid = self._process.pid

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(self._process.wait())
        return json.loads(line)

    def ask(self, name: str, *args: object) -> Any:
        """Run a command in it and return the answer; EOFError with its exit code if it dies."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *args]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def connect(self, server: LazyPages | str, *, zombies: Sequence[int] = ()) -> None:
        """Be restored."""
        path = server if isinstance(server, str) else server.path
        self.ask("connect", path, PID, list(zombies))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._timer.cancel()


@contextmanager
def serving(server: LazyPages) -> Iterator[list[RestoreReport]]:
    """Serve in a thread until the block ends and all restores are complete."""
    thread = threading.Thread(target=server.serve, name="criu-serve")
    thread.start()
    try:
        yield server.reports
    except BaseException:
        server.stop(now=True)
        raise
    finally:
        thread.join(LIMIT_S * SCALE)
        assert not thread.is_alive()


@contextmanager
def served(*args: Any, **options: Any) -> Iterator[LazyPages]:
    """Make a `LazyPages` and serve until the block ends and all restores are complete."""
    with LazyPages(*args, **options) as server, serving(server):
        yield server


def write_images(
    folder: Path,
    starts: Sequence[int],
    pages: Sequence[int],
    runs: Sequence[tuple[int, int, int]],
    *,
    zombies: Sequence[int] = (),
) -> list[list[int]]:
    """Write images of a process with these regions; runs are (region, first page, pages).

    Returns the first eight bytes of each page of each region.
    """
    from tests.criu._images import pattern

    folder.mkdir(exist_ok=True)
    write_tree(folder, [PID, *zombies])
    spans = sorted(
        (start, start + count * PAGE) for start, count in zip(starts, pages, strict=True)
    )
    write_mappings(folder, PID, spans)
    found = sorted((starts[region] + at * PAGE, count) for region, at, count in runs)
    write_pagemap(folder, PID, [(start, count, LAZY | PRESENT) for start, count in found])
    stamps = [[0] * count for count in pages]
    number = 0
    for start, count in found:
        region = next(n for n, s in enumerate(starts) if 0 <= start - s < pages[n] * PAGE)
        at = (start - starts[region]) // PAGE
        for page in range(at, at + count):
            stamps[region][page] = int.from_bytes(pattern(number)[:8], "little")
            number += 1
    return stamps


def children_of(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    return [child.pid for child in psutil.Process(pid).children()]
