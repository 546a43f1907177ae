"""Attach, and be killed at each point of it; test_attach.py runs this in a child process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from pyuffd import Feature, Process, UffdOSError
from pyuffd._remote_calls import AttachPoint
from pyuffd.remote import _attach
from pyuffd.testing._run import SCALE
from tests._tasks import of_threads

FEATURES = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
LIMIT_S = 10 * SCALE
POINTS = [point for point in AttachPoint if point not in (AttachPoint.BEGIN, AttachPoint.DONE)]


def start(program: str, *words: str) -> subprocess.Popen[bytes]:
    """Start a program of targets.c, and wait until it is ready."""
    popen = subprocess.Popen(
        [program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert popen.stdout is not None
    assert popen.stdout.readline() == b"ready\n"
    return popen


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


KEPT = ("TracerPid", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Seccomp", "Threads")


def seen(pid: int) -> dict[str, object]:
    """Return what must be the same afterwards."""
    found: dict[str, object] = {key: status(pid)[key] for key in KEPT}
    found["fd"] = sorted(
        (name, os.readlink(f"/proc/{pid}/fd/{name}")) for name in os.listdir(f"/proc/{pid}/fd")
    )
    return found


def wait_until(what: object, condition: object) -> None:
    give_up = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up, what
        time.sleep(0.001)


def answers(target: subprocess.Popen[bytes]) -> None:
    """Check that the target runs, and that its registers have kept their values."""
    target.send_signal(signal.SIGUSR1)
    assert target.stdout is not None
    assert target.stdout.readline() == b"kept\n"
    assert target.poll() is None


def helper_of(pid: int) -> int:
    """Return the helper process that injects system calls for a process."""
    for children in of_threads(pid, "children").values():
        for child in children.split():
            # Made without an exec, so it has the name of the thread that made it.
            if os.readlink(f"/proc/{child}/exe") == os.readlink(f"/proc/{pid}/exe"):
                return int(child)
    raise AssertionError("no injection under way")


def killed_at_each_point(program: str, whom: str) -> None:
    """Kill our fork, or the helper that injects for it: the target notices nothing."""
    target = start(program, "spin")
    before = seen(target.pid)
    mapped = _count_mapped(target.pid)
    for point in POINTS:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            _attach_held(target.pid, point, write_end)
            os._exit(0)
        os.close(write_end)
        assert os.read(read_end, 1) == b"h", point
        os.close(read_end)
        os.kill(pid if whom == "us" else helper_of(pid), signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_until(f"{point!r}: {seen(target.pid)} {before}", lambda: seen(target.pid) == before)
        answers(target)
    # The injection leaves its pages mapped each time it is killed half-way, and never otherwise.
    assert _count_mapped(target.pid) - mapped <= (0 if whom == "us" else len(POINTS) * 12288)
    target.kill()
    target.wait()


def without_its_files(program: str) -> None:
    """The helper has only a userfaultfd open, and the target has none."""
    target = start(program, "spin")
    before = seen(target.pid)
    errors: list[UffdOSError] = []
    _attach.hold = AttachPoint.OPENED
    with Process(target.pid) as process:
        thread = threading.Thread(target=_attach_noting, args=(process, errors))
        thread.start()
        wait_until("it is held", lambda: _attach.attempts and _attach.attempts[0].is_held)
        (helper,) = {*os.listdir(f"/proc/{target.pid}/task")} - {str(target.pid)}
        files = Path(f"/proc/{target.pid}/task/{helper}/fd")
        assert [os.readlink(each) for each in files.iterdir()] == ["anon_inode:[userfaultfd]"]
        assert seen(target.pid)["fd"] == before["fd"]
        _attach.hold = None
        _attach.attempts[0].release()
        thread.join(LIMIT_S)
    assert not errors
    assert seen(target.pid) == before
    answers(target)
    target.kill()
    target.wait()


def frozen_meanwhile(program: str, name: str, folder: str) -> None:
    """Freeze the target's cgroup at a point of the attach, which then gives up."""
    cgroup = Path(folder)

    def freeze(number: int) -> None:
        (cgroup / "cgroup.freeze").write_text(str(number))
        events = cgroup / "cgroup.events"
        # The helper counts as frozen, as its tracer has stopped it.
        wait_until("frozen", lambda: f"frozen {number}" in events.read_text())

    target = start(program, "spin")
    (cgroup / "cgroup.procs").write_text(str(target.pid))
    before = seen(target.pid)
    mapped = _count_mapped(target.pid)
    errors: list[UffdOSError] = []
    for _ in range(2):
        _attach.attempts.clear()
        _attach.hold = AttachPoint[name]
        with Process(target.pid) as process:
            thread = threading.Thread(target=_attach_noting, args=(process, errors, 0.2))
            thread.start()
            wait_until("held", lambda: _attach.attempts and _attach.attempts[0].is_held)
            _attach.hold = None
            freeze(1)
            _attach.attempts[0].release()
            thread.join(LIMIT_S)
        assert not thread.is_alive()
        wait_until("at its own place", lambda: _is_at_its_own_place(target.pid))
        freeze(0)
        wait_until(f"{seen(target.pid)} {before}", lambda: seen(target.pid) == before)
        answers(target)
    assert [error.errno for error in errors] == [errno.ETIMEDOUT] * 2
    # The pages that its thread could not unmap while it was frozen.
    assert _count_mapped(target.pid) - mapped <= (0 if name == "MASKED" else 2 * 12288)
    target.kill()
    target.wait()


def _is_at_its_own_place(pid: int) -> bool:
    """Whether the first thread's stack pointer is where its program left it."""
    words = Path(f"/proc/{pid}/syscall").read_text().split()
    if words == ["running"]:
        return False
    sp = int(words[-2], 16)
    with Process(pid) as process:
        stack = next(m for m in process.mappings() if m.path == "[stack]")
    # An injection uses the other end of the stack.
    return stack.end - stack.length // 2 < sp < stack.end


# What another thread of the target does meanwhile, with the byte that triggers it.
DEEDS = {"exit": b"x", "exec": b"e", "fork": b"f"}


def deed_at_each_point(program: str, deed: str) -> None:
    """Let the target exit, execute a program or fork, at each point of an attach."""
    for point in POINTS:
        target = start(program, "obey")
        assert target.stdin is not None
        assert target.stdout is not None
        errors: list[UffdOSError] = []
        _attach.hold = point
        with Process(target.pid) as process:
            thread = threading.Thread(target=_attach_noting, args=(process, errors))
            thread.start()
            wait_until(
                f"held at {point!r}", lambda: _attach.attempts and _attach.attempts[0].is_held
            )
            _attach.hold = None
            target.stdin.write(DEEDS[deed])
            if deed == "fork":
                line = target.stdout.readline()
                assert line == b"forked\n", (point, line)
            else:
                # It waits for the traced thread, which waits for us.
                wait_until(f"{deed} at {point!r}", lambda pid=target.pid: _is_ending(pid))
            _attach.attempts[0].release()
            thread.join(LIMIT_S)
            assert not thread.is_alive(), point
        if deed == "exit":
            assert target.wait(LIMIT_S) == 7, point
            assert [error.errno for error in errors] in ([], [errno.ESRCH]), point
        else:
            if deed == "exec":
                assert target.stdout.readline() == b"ready\n", point
                assert [error.errno for error in errors] in ([], [errno.ESRCH]), point
            else:
                assert not errors, point
            assert status(target.pid)["TracerPid"] == "0"
            answers(target)
        target.kill()
        target.communicate()


def _is_ending(pid: int) -> bool:
    """Whether a thread of it has been killed; in an exit of all threads, another than the first."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        states = [
            Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(") ")[2][0] for tid in tasks
        ]
    except OSError:
        return True
    return len(tasks) == 1 or bool({"Z", "X"} & {*states})


def _attach_noting(process: Process, errors: list[UffdOSError], limit_s: float = LIMIT_S) -> None:
    try:
        process.attach(FEATURES, timeout_s=limit_s).close()
    except UffdOSError as error:
        errors.append(error)


def _count_mapped(pid: int) -> int:
    with Process(pid) as process:
        return process.mappings().bytes


def _attach_held(pid: int, point: AttachPoint, report: int) -> None:
    _attach.hold = point

    def tell() -> None:
        while not (_attach.attempts and _attach.attempts[0].is_held):
            time.sleep(0.0005)
        os.write(report, b"h")

    threading.Thread(target=tell, daemon=True).start()
    with Process(pid) as process:
        try:
            process.attach(FEATURES, timeout_s=LIMIT_S).close()
        except UffdOSError:
            return  # the injection was killed


def page_apart(program: str) -> None:
    """Hold an attach whose page is mapped: it must be far from what the target has mapped."""
    target = start(program, "obey")
    with Process(target.pid) as process:
        before = {m.start for m in process.mappings()}
        _attach.hold = AttachPoint.MAPPED
        thread = threading.Thread(target=_attach_noting, args=(process, []))
        thread.start()
        wait_until("held", lambda: _attach.attempts and _attach.attempts[0].is_held)
        found = list(process.mappings())
        _attach.hold = None
        _attach.attempts[0].release()
        thread.join()
    ends = [0, *(m.end for m in found)]
    starts = [*(m.start for m in found[1:]), 1 << 64]
    apart = [
        min(m.start - end, start - m.end)
        for m, end, start in zip(found, ends, starts, strict=False)
        if m.start not in before
    ]
    assert len(apart) == 1, apart
    assert apart[0] > 1 << 30, hex(apart[0])
    target.kill()
    target.wait()


def many_rounds(program: str, rounds: int) -> list[int]:
    """Attach and detach; return for how many nanoseconds the thread was stopped, sorted.

    This process, and the target, which inherits that, have real-time priority, so that no other
    process adds to the time.
    """
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    target = start(program, "spin")
    before, mapped = seen(target.pid), _count_mapped(target.pid)
    times = []
    with Process(target.pid) as process:
        for _ in range(rounds):
            process.attach(FEATURES).close()
            times.append(process._attached.stopped_ns)
    answers(target)
    assert seen(target.pid) == before
    assert _count_mapped(target.pid) == mapped
    target.kill()
    target.wait()
    return sorted(times)
