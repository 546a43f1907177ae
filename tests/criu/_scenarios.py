"""What tests with CRIU do, as the first process of a PID namespace."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyuffd.criu import LazyPages, RestoreReport
from pyuffd.testing._run import SCALE
from tests.criu._programs import children_of, served, serving

CRIU = os.environ.get("PYUFFD_CRIU", "criu")
LIMIT_S = 60.0


class Criu:
    """CRIU with its folders."""

    def __init__(self, folder: str) -> None:
        self.images = Path(folder) / "images"
        self.work = Path(folder) / "work"
        for path in (self.images, self.work):
            path.mkdir(exist_ok=True)

    def start(self, command: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a command of CRIU, with its log in the work dir."""
        return subprocess.Popen(
            [
                *(CRIU, command, "-D", str(self.images), "-W", str(self.work)),
                *("-o", f"{command}.log", "-v4", *options),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def run(self, command: str, *options: str) -> None:
        """Run a command of CRIU."""
        self.check(command, self.start(command, *options))

    def check(self, command: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for a command of CRIU."""
        if process.wait(LIMIT_S * SCALE):
            log = (self.work / f"{command}.log").read_text().splitlines()
            wrong = [line for line in log if "Error" in line and "RLIMIT_NOFILE" not in line]
            raise AssertionError(f"criu {command} failed: {wrong[:5] or log[-5:]}")

    def dump(self, process: subprocess.Popen[Any], *options: str) -> None:
        """Dump a process, which ends."""
        self.run("dump", "-t", str(process.pid), *options)
        assert process.wait(LIMIT_S * SCALE) == -signal.SIGKILL

    def restore(self, *options: str) -> int:
        """Restore lazily, and return the pid; the process is then a child of this one."""
        pid = self.work / "pid"
        pid.unlink(missing_ok=True)
        self.run("restore", "--lazy-pages", "-d", "--pidfile", str(pid), *options)
        return int(pid.read_text())


def wait_for(true: Callable[[], object]) -> None:
    """Wait until something is true."""
    give_up = time.monotonic() + LIMIT_S * SCALE
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def start_target(folder: str, *words: str) -> subprocess.Popen[bytes]:
    """Start tests/criu/targets.c, and wait until it is ready."""
    ready = Path(folder) / "ready"
    process = subprocess.Popen(
        [str(Path(folder) / "targets"), str(ready), *words],
        start_new_session=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(ready.exists)
    return process


def build(folder: str) -> None:
    """Build it."""
    source = Path(__file__).with_name("targets.c")
    command = ["cc", "-O2", "-static", "-o", str(Path(folder) / "targets"), str(source)]
    subprocess.run(command, check=True)


def status_after_signal(pid: int) -> int:
    """Let a restored target check its memory, and return its exit status."""
    os.kill(pid, signal.SIGUSR1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def told(reports: Sequence[RestoreReport]) -> list[dict[str, Any]]:
    """Return the reports as JSON."""
    return [report.as_dict() for report in reports]


def numbers(folder: str, mib: int, changes: bool, restores: int, threads: int) -> Any:
    """Restore a process that checks each word; with several restores, one after the other."""
    criu = Criu(folder)
    build(folder)
    criu.dump(start_target(folder, str(mib), *(["changes"] if changes else [])))
    codes = []
    with served(criu.images, work_dir=criu.work, restores=restores, threads=threads) as server:
        for _ in range(restores):
            codes.append(status_after_signal(criu.restore()))
    return [codes, told(server.reports)]


def worker_killed(folder: str, mib: int) -> Any:
    """Kill the worker process while the process checks its memory."""
    criu = Criu(folder)
    build(folder)
    criu.dump(start_target(folder, str(mib)))
    hot = criu.work / "hot"
    with LazyPages(criu.images, work_dir=criu.work, working_set=hot, record_s=1.0) as server:
        assert server._spare is not None
        keeper = server._spare.handler()._running_engine().pids()[0]  # type: ignore[attr-defined]
        with serving(server) as reports:
            pid = criu.restore()
            os.kill(pid, signal.SIGUSR1)
            for _ in range(3):
                time.sleep(0.05)
                os.kill(min(children_of(keeper)), signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [code, told(reports)]
