"""Attaching to running processes, and stopping them: nothing is left behind, whoever is killed."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pyuffd import (
    Feature,
    Process,
    ProcessGoneError,
    RangeBusyError,
    RegisterMode,
    StopTimeoutError,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
)
from pyuffd.remote import _attach as attaching
from pyuffd.remote import _threads as threads_of_others
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._run import SCALE
from tests._child import run_child
from tests.process._attach import FEATURES, answers, seen, start, status, wait_until

pytestmark = [needs(FEATURES), needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")]
ROUNDS = 25
PAGE = 4096


@pytest.fixture(scope="module")
def program() -> Iterator[str]:
    source = Path(__file__).parent / "targets.c"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # other users get there
        os.chmod(folder, 0o755)
        target = f"{folder}/targets"
        subprocess.run(["cc", "-O2", "-Wall", "-pthread", "-o", target, source], check=True)
        yield target


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Targets to end with the test."""
    targets: list[subprocess.Popen[bytes]] = []
    yield targets
    for target in targets:
        target.kill()
        target.communicate()


def attached(pid: int, features: Feature = FEATURES) -> None:
    """Attach, use it, and leave; everything is as before."""
    with Process(pid) as process:
        mappings = process.mappings()
        before = seen(pid)
        with process.attach(features) as uffd:
            assert uffd.owner_pid == pid
            assert uffd.features == features
            stack = next(m for m in mappings if m.path == "[stack]")
            uffd.register(stack.start, stack.length, mode=RegisterMode.WP)
            uffd.writeprotect(stack.start, stack.length)
        assert seen(pid) == before
        assert process.mappings() == mappings


def test_the_page_is_apart(program: str) -> None:
    """Other threads of the target run meanwhile, and may fill a hole again that they have made."""
    run_child("tests.process._attach:page_apart", program)


@pytest.mark.parametrize("whom", ["us", "injection"])
def test_a_kill_at_each_point(program: str, whom: str) -> None:
    run_child("tests.process._attach:killed_at_each_point", program, whom, budget_s=60)


@needs_privilege("CAP_SYS_NICE")
def test_many_rounds(program: str) -> None:
    times = run_child("tests.process._attach:many_rounds", program, ROUNDS, budget_s=60).value
    assert times[0] < 1_000_000 * SCALE, "a millisecond, where nobody else has the CPU"


@pytest.mark.stress
@needs_privilege("CAP_SYS_NICE")
def test_a_thousand_rounds(program: str) -> None:
    run_child("tests.process._attach:many_rounds", program, 1000, budget_s=600)


# mode: what is sent to it at last, and what it then says (result, errno).
SLEEPERS = {
    "nanosleep": (None, "0 0"),
    "poll": (None, "0 0"),
    "futex": (None, f"-1 {errno.ETIMEDOUT}"),
    "epoll_wait": (b"x", "1 0"),
    "read": (b"x", "1 0"),
    "pause": (signal.SIGUSR1, f"-1 {errno.EINTR}"),
}


def test_sleepers_sleep_as_long_as_they_meant_to(
    program: str, ended: list[subprocess.Popen[bytes]]
) -> None:
    """They are interrupted often, and neither return early nor start over."""
    sleep_ms = 3000
    for mode in SLEEPERS:
        ended.append(start(program, mode, str(sleep_ms)))
    for target in ended:
        wait_until("it sleeps", lambda pid=target.pid: status(pid)["State"][0] == "S")
    begin = time.monotonic()
    interrupted_ms = 0.0
    while interrupted_ms < sleep_ms / 3:
        for target in ended:
            attached(target.pid)
            with Process(target.pid) as process, process.stopped(10 * SCALE):
                assert status(target.pid)["State"][0] == "t"
        interrupted_ms = (time.monotonic() - begin) * 1000
    for target, (mode, (last, said)) in zip(ended, SLEEPERS.items(), strict=True):
        assert target.stdin is not None
        if isinstance(last, bytes):
            target.stdin.write(last)
        elif last is not None:
            target.send_signal(last)
        assert target.stdout is not None
        result = target.stdout.readline().decode().rsplit(" ", 1)
        assert result[0] == said, mode
        if last is None:
            # If the last interruption had restarted it, it would take that much longer.
            assert sleep_ms - 2 <= float(result[1]) < sleep_ms + interrupted_ms, mode


def test_a_stopped_target_stays_stopped(program: str, ended: list[subprocess.Popen[bytes]]) -> None:
    target = start(program, "spin")
    ended.append(target)
    target.send_signal(signal.SIGSTOP)
    wait_until("it is stopped", lambda: status(target.pid)["State"][0] == "T")
    attached(target.pid)
    wait_until("it is stopped again", lambda: status(target.pid)["State"][0] == "T")
    with Process(target.pid) as process, process.stopped(10 * SCALE):
        pass
    wait_until("it is stopped again", lambda: status(target.pid)["State"][0] == "T")
    target.send_signal(signal.SIGCONT)
    answers(target)


def test_a_seccomp_filter_is_in_force_again(
    program: str, ended: list[subprocess.Popen[bytes]]
) -> None:
    """A filter that kills for userfaultfd(2): it is suspended meanwhile."""
    target = start(program, "spin", "seccomp")
    ended.append(target)
    attached(target.pid)
    answers(target)
    assert status(target.pid)["Seccomp"] == "2"


def test_another_user_without_privilege(program: str, ended: list[subprocess.Popen[bytes]]) -> None:
    """The target may not open a userfaultfd; the device is passed in."""
    if not os.path.exists(attaching.DEVICE):
        pytest.skip(f"there is no {attaching.DEVICE}")
    target = subprocess.Popen(
        [program, "spin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, user=65534
    )
    ended.append(target)
    assert target.stdout is not None
    assert target.stdout.readline() == b"ready\n"
    attached(target.pid)
    answers(target)


def test_another_user_without_the_device(
    program: str, ended: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error tells what is missing: it names the step that failed, not those after it."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("vm.unprivileged_userfaultfd lets every user open one")
    monkeypatch.setattr(attaching, "DEVICE", "/nowhere/userfaultfd")
    target = subprocess.Popen(
        [program, "spin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, user=65534
    )
    ended.append(target)
    assert target.stdout is not None
    assert target.stdout.readline() == b"ready\n"
    with Process(target.pid) as process, pytest.raises(UffdPermissionError) as caught:
        process.attach(FEATURES)
    assert "userfaultfd in the target" in str(caught.value)
    assert "could not be opened for it" in str(caught.value)
    answers(target)


def test_a_target_that_may_have_no_more_descriptors(
    program: str, ended: list[subprocess.Popen[bytes]]
) -> None:
    target = start(program, "spin")
    ended.append(target)
    resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (3, 3))
    attached(target.pid)
    answers(target)
    resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (0, 0))
    with Process(target.pid) as process, pytest.raises(UffdOSError, match="below the three"):
        process.attach(FEATURES)
    answers(target)


def test_a_large_table_is_not_copied(program: str) -> None:
    """Its copy would last, and closing the copies reaches file systems and message queues."""
    run_child("tests.process._attach:without_its_files", program, budget_s=30)


def test_in_other_namespaces(program: str, ended: list[subprocess.Popen[bytes]]) -> None:
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    outer = subprocess.Popen(
        [*command, program, "spin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    ended.append(outer)
    assert outer.stdout is not None
    if outer.stdout.readline() != b"ready\n":
        pytest.skip("unshare(1) cannot make user and PID namespaces here")
    (pid,) = (child.pid for child in psutil.Process(outer.pid).children())
    attached(pid)
    os.kill(pid, signal.SIGUSR1)
    assert outer.stdout.readline() == b"kept\n"
    os.kill(pid, signal.SIGKILL)


def test_threads_and_a_python_target(ended: list[subprocess.Popen[bytes]]) -> None:
    code = (
        "import threading, time\n"
        "for _ in range(20):\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "while input(): print(sum(range(100000)), flush=True)\n"
    )
    target = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    ended.append(target)
    assert target.stdin is not None
    assert target.stdout is not None
    assert target.stdout.readline() == b"ready\n"
    attached(target.pid)
    with Process(target.pid) as process:
        with process.stopped(10 * SCALE) as stop:
            assert stop.threads == 21
            assert {thread.state for thread in process.threads()} == {"t"}
        wait_until("it runs", lambda: {t.state for t in process.threads()} <= {"S", "R"})
    target.stdin.write(b"go\n")
    assert target.stdout.readline() == b"4999950000\n"


def test_a_vfork_child_and_its_parent(program: str, ended: list[subprocess.Popen[bytes]]) -> None:
    """They share the memory: both are stopped; the parent waits in the kernel anyway."""
    target = start(program, "vfork", "60000")
    ended.append(target)
    children = psutil.Process(target.pid).children
    wait_until("it has a child", children)
    child = children()[0].pid
    attached(child)
    for pid in (target.pid, child):
        with Process(pid) as process, process.stopped(10 * SCALE) as stop:
            assert set(stop.pids) == {target.pid, child}
            assert status(child)["State"][0] == "t"
    with Process(target.pid) as process, pytest.raises(UffdOSError) as caught:
        process.attach(FEATURES, timeout_s=0.2)
    assert caught.value.errno == errno.ETIMEDOUT
    assert "state D" in caught.value.hint
    assert status(child)["State"][0] == "S"
    os.kill(child, signal.SIGKILL)  # until then its parent cannot be ended


def stopped_and_killed(program: str) -> None:
    target = start(program, "spin")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        with Process(target.pid) as process, process.stopped(10 * SCALE):
            os.write(write_end, b"s")
            time.sleep(600)
    os.read(read_end, 1)
    assert status(target.pid)["State"][0] == "t"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until("it is let go", lambda: status(target.pid)["TracerPid"] == "0")
    answers(target)
    target.kill()
    target.wait()


def test_a_kill_while_it_is_stopped(program: str) -> None:
    run_child(stopped_and_killed, program, budget_s=30)


def test_an_exception_and_another_thread_let_it_go(
    program: str, ended: list[subprocess.Popen[bytes]]
) -> None:
    import threading

    target = start(program, "spin")
    ended.append(target)
    with Process(target.pid) as process:
        with pytest.raises(KeyError), process.stopped(10 * SCALE):
            raise KeyError
        answers(target)
        stop = process.stopped(10 * SCALE)
        thread = threading.Thread(target=stop.close)
        thread.start()
        thread.join()
        answers(target)


def test_refusals(program: str, ended: list[subprocess.Popen[bytes]]) -> None:
    target = start(program, "spin")
    ended.append(target)
    with Process(os.getpid()) as own:
        with pytest.raises(ValueError, match="itself"):
            own.attach()
        with pytest.raises(ValueError, match="itself"):
            own.stopped()
    with Process(target.pid) as process:
        with pytest.raises(UnsupportedFeatureError):
            process.attach(Feature(1 << 60))
        with pytest.raises(ValueError, match="WP_ASYNC"):
            process.attach(Feature.PAGEFAULT_FLAG_WP, user_mode_only=True)
        with pytest.raises(TypeError):
            process.attach(timeout_s="soon")  # type: ignore[arg-type]
        with process.attach(FEATURES, user_mode_only=True):
            pass
        with process.stopped(10 * SCALE), pytest.raises(RangeBusyError, match="traces it"):
            process.attach()
        with process.stopped(10 * SCALE):
            tracer = status(target.pid)["TracerPid"]
            with pytest.raises(UffdPermissionError, match=f"process {tracer} .* traces it"):
                process.stopped()
        target.kill()
        target.wait()
        with pytest.raises(ProcessGoneError):
            process.attach()
        with pytest.raises(ProcessGoneError):
            process.stopped()


@pytest.mark.parametrize("what", ["attach", "stop"])
def test_a_tracer_that_leaves(
    program: str,
    ended: list[subprocess.Popen[bytes]],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two programs that trace for a moment do not refuse each other."""
    monkeypatch.setattr(threads_of_others, "LEAVE_S", 20 * SCALE)
    monkeypatch.setattr(attaching, "LEAVE_S", 20 * SCALE)
    target = start(program, "spin")
    ended.append(target)
    with Process(target.pid) as process, Process(target.pid) as other:
        stop = other.stopped(10 * SCALE)
        looks = threading.Event()
        hint = threads_of_others.traced_hint

        def look(tid: int) -> str:
            looks.set()
            return hint(tid)

        def leave() -> None:
            looks.wait()
            stop.close()

        monkeypatch.setattr(threads_of_others, "traced_hint", look)
        leaving = threading.Thread(target=leave)
        leaving.start()
        try:
            (process.attach(timeout_s=10) if what == "attach" else process.stopped(10)).close()
        finally:
            looks.set()
            leaving.join()
        answers(target)


def test_a_refusal_without_a_tracer(
    program: str, ended: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that came and went is not named once nobody traces the thread any more."""
    target = start(program, "spin")
    ended.append(target)
    monkeypatch.setattr(threads_of_others, "LEAVE_S", 20 * SCALE)
    refusals = threads_of_others.Refusals()
    monkeypatch.setattr(threads_of_others, "LEAVE_S", 0)
    hurried = threads_of_others.Refusals()
    with Process(target.pid) as process, process.stopped(10 * SCALE):
        assert not hurried.try_again(target.pid)
        assert "traces it" in hurried.why("refused")
    tries = 1
    while refusals.try_again(target.pid):
        tries += 1
    assert 2 <= tries < 10
    assert refusals.why("refused") == "refused"


def test_what_is_not_x86_64_is_refused(ended: list[subprocess.Popen[bytes]]) -> None:
    """By the first bytes of its program; the registers would tell otherwise."""
    header = bytearray(Path(sys.executable).resolve().read_bytes()[:20])
    header[18:20] = (40).to_bytes(2, "little")
    target = subprocess.Popen(["sleep", "600"], bufsize=0)
    ended.append(target)

    class Elsewhere:
        pid = memory_tid = target.pid

        def check(self) -> None: ...

    real = open

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        import io

        return io.BytesIO(header) if str(path).endswith("/exe") else real(path, *args, **kwargs)

    attaching.open = opened  # type: ignore[attr-defined]
    try:
        with pytest.raises(UffdOSError, match="not a 64-bit program"):
            attaching._refuse(Elsewhere(), target.pid)  # type: ignore[arg-type]
    finally:
        del attaching.open  # type: ignore[attr-defined]


def test_a_thread_in_state_d(program: str, ended: list[subprocess.Popen[bytes]]) -> None:
    """A reader of a frozen file system; by a userfaultfd that nobody serves."""
    code = (
        "import os, sys\n"
        "from pyuffd import Userfaultfd, Region, Feature\n"
        "u = Userfaultfd(features=Feature.EVENT_REMOVE)\n"
        "r = Region.anonymous(4096)\n"
        "u.register(r)\n"
        "print('ready', flush=True)\n"
        "import mmap\n"
        "r.madvise(mmap.MADV_DONTNEED)\n"  # waits until the event is read: state D
    )
    target = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYUFFD_WATCH": "0"},
    )
    ended.append(target)
    assert target.stdout is not None
    assert target.stdout.readline() == b"ready\n"
    wait_until("it waits", lambda: status(target.pid)["State"][0] == "D")
    with Process(target.pid) as process, pytest.raises(StopTimeoutError) as caught:
        process.stopped(0.1)
    assert caught.value.state == "D"
    assert caught.value.tid in (int(name) for name in os.listdir(f"/proc/{target.pid}/task"))
    assert status(target.pid)["TracerPid"] == "0"


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of version 2."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    top = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if top is None or not os.access(top, os.W_OK):
        pytest.skip("no cgroup of version 2 can be made")
    folder = top / f"pyuffd-{os.getpid()}"
    folder.mkdir()
    yield folder
    (folder / "cgroup.freeze").write_text("0")
    wait_until("it is empty", lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def freeze(cgroup: Path, *, frozen: bool = True) -> None:
    (cgroup / "cgroup.freeze").write_text(str(int(frozen)))
    wait_until("frozen", lambda: f"frozen {int(frozen)}" in (cgroup / "cgroup.events").read_text())


def stack_pointer(pid: int) -> str:
    """Wait until the thread is frozen again after a tracer, and return its stack pointer."""
    words = Path(f"/proc/{pid}/syscall")
    wait_until("it does not run", lambda: words.read_text() != "running\n")
    return words.read_text().split()[-2]


def test_a_frozen_target_is_refused_as_it_is(program: str, cgroup: Path) -> None:
    target = start(program, "spin")
    try:
        (cgroup / "cgroup.procs").write_text(str(target.pid))
        freeze(cgroup)
        sp = stack_pointer(target.pid)
        with Process(target.pid) as process:
            with pytest.raises(UffdOSError, match="frozen") as caught:
                process.attach(FEATURES)
            assert caught.value.errno == errno.ETIMEDOUT
            with process.stopped():
                pass
        assert stack_pointer(target.pid) == sp
        freeze(cgroup, frozen=False)
        answers(target)
    finally:
        target.kill()
        target.communicate()


@pytest.mark.parametrize("point", ["MASKED", "CLONED", "OPENED"])
def test_a_target_that_is_frozen_meanwhile(point: str, program: str, cgroup: Path) -> None:
    """What was begun is undone without a CPU for its thread, so that nothing piles up."""
    run_child("tests.process._attach:frozen_meanwhile", program, point, str(cgroup))


def test_targets_that_end_or_fork_meanwhile() -> None:
    """At any step: an error that says so, or success, and never a zombie that nobody reaps."""
    refused: set[int | None] = set()
    for number in range(12):
        target = subprocess.Popen(
            ["sh", "-c", "for i in 1 2 3; do /bin/true; done; exec sleep 0.01"]
        )
        time.sleep(number * 0.0007)
        try:
            with Process(target.pid) as process, process.attach(FEATURES):
                pass
        except UffdOSError as error:
            refused.add(error.errno)
        assert target.wait(30 * SCALE) == 0
    # Without its C library it has no way home yet; the vfork of Popen ends in an execve.
    assert refused <= {errno.ESRCH, errno.ETIMEDOUT, errno.EOPNOTSUPP}


# Without a C library: what a program has mapped before its loader has mapped that.
BARE = """
static long call(long n, long a, long b, long c, long d, long e)
{
	register long flags __asm__("r10") = d, fd __asm__("r8") = e, offset __asm__("r9") = 0;
	long r;

	__asm__ volatile("syscall" : "=a"(r)
				: "a"(n), "D"(a), "S"(b), "d"(c), "r"(flags), "r"(fd), "r"(offset)
				: "rcx", "r11", "memory");
	return r;
}

void _start(void)
{
	long time[2] = { WAIT_S, 200000000 };

	call(35, (long)time, 0, 0, 0, 0); /* nanosleep */
	/* open, and mmap for reading and execution */
	call(9, 0, 2 << 20, 5, 2, call(2, (long)"LIBC", 0, 0, 0, 0));
	for (;;)
		call(34, 0, 0, 0, 0, 0); /* pause */
}
"""


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_program_that_is_being_loaded(
    is_loaded: bool, tmp_path: Path, ended: list[subprocess.Popen[bytes]]
) -> None:
    """It has no code yet that brings its thread home; that is waited for, to the limit."""
    maps = Path("/proc/self/maps").read_text().split()
    libc = next(word for word in maps if "/libc.so" in word or "/libc-" in word)
    text = BARE.replace("WAIT_S", "0" if is_loaded else "60").replace("LIBC", libc)
    (tmp_path / "bare.c").write_text(text)
    flags = ["-O1", "-static", "-nostdlib", "-fno-stack-protector", "-fcf-protection=none"]
    subprocess.run(["cc", *flags, "-o", tmp_path / "bare", tmp_path / "bare.c"], check=True)
    ended.append(subprocess.Popen([tmp_path / "bare"]))
    with Process(ended[0].pid) as process:
        if is_loaded:
            process.attach(FEATURES, timeout_s=10 * SCALE).close()
        else:
            with pytest.raises(UffdOSError, match="no return from a signal handler"):
                process.attach(FEATURES, timeout_s=0.1)
