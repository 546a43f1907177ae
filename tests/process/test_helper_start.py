"""The helper process starts and ends properly, whatever the program did before."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyuffd import BufferSource, CallableSource, Handler, Region, Userfaultfd
from pyuffd._errors import HelperLostError
from pyuffd.handlers.process._remote import RemoteEngine
from pyuffd.testing import no_leaks
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import run_child
from tests.process import _process_sources as sources
from tests.process._process_sources import PAGE, content
from tests.process._scripts import run_program

LENGTH = 4 * PAGE
WAIT_S = 20.0
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 36, 38
CLONE_NEWPID = 0x20000000


def processes(handler: Handler) -> tuple[int, int]:
    engine = handler._engine
    assert isinstance(engine, RemoteEngine)
    return engine.pids()


def kill_worker(handler: Handler, number: int = signal.SIGKILL) -> None:
    _, worker = processes(handler)
    os.kill(worker, number)
    give_up = time.monotonic() + WAIT_S
    while processes(handler)[1] == worker:
        assert time.monotonic() < give_up
        time.sleep(0.002)


@contextlib.contextmanager
def serving(function: Callable[[int, int], bytes]) -> Iterator[tuple[Handler, Region]]:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(LENGTH) as region,
        Handler(uffd, driver="process") as handler,
    ):
        handler.serve(region, CallableSource(function))
        yield handler, region


def use() -> None:
    """Serve, replace a worker process, stop, and leave nothing behind."""
    with no_leaks(), serving(sources.talking) as (handler, region):
        assert region.read(0, PAGE) == content(PAGE)
        kill_worker(handler)
        assert region.read() == content(LENGTH)


# Actions of the program


def ignored_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def reaped_children() -> None:
    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    signal.signal(signal.SIGCHLD, reap)


def waited_children() -> None:
    def wait() -> None:
        while True:
            try:
                os.wait()
            except ChildProcessError:
                time.sleep(0.001)

    threading.Thread(target=wait, daemon=True).start()


def blocked_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def ignored_signals() -> None:
    for number in signal.valid_signals():
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_IGN)


def default_sigpipe() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def closing(*fds: int) -> Callable[[], None]:
    def close() -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    return close


def daemonised() -> None:
    """As daemons do; afterwards other descriptors get these numbers."""
    for fd in range(3):
        os.close(fd)
        os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)


def removed_directory() -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")


def umask() -> None:
    os.umask(0o777)


def environment() -> None:
    os.environ.clear()


def bad_directory() -> None:
    """Modules with names that the helper needs, all of them broken."""
    for name in ("select", "resource", "socket", "pickle", "pyuffd", "cffi"):
        Path(f"{name}.py").write_text("raise ImportError('not this one')")
    sys.path.insert(0, "")
    sys.path.insert(0, str(Path.cwd()))


def prctl(option: int, value: int) -> Callable[[], None]:
    def call() -> None:
        assert ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0

    return call


def forking_threads() -> None:
    """Forks that outlive the helper, with all descriptors that existed."""

    def fork() -> None:
        while True:
            pid = os.fork()
            if pid == 0:
                time.sleep(0.2)
                os._exit(0)
            os.waitpid(pid, 0)

    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
    for _ in range(2):
        threading.Thread(target=fork, daemon=True).start()


BEFORE: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "SIGCHLD ignored": ignored_children,
    "SIGCHLD handled": reaped_children,
    "children waited for": waited_children,
    "signals blocked": blocked_signals,
    "signals ignored": ignored_signals,
    "SIGPIPE": default_sigpipe,
    "stdin closed": closing(0),
    "stdout closed": closing(1),
    "stderr closed": closing(2),
    "all closed": closing(0, 1, 2),
    "daemon": daemonised,
    "working directory removed": removed_directory,
    "umask": umask,
    "environment": environment,
    "shadowing modules": bad_directory,
    "not dumpable": prctl(PR_SET_DUMPABLE, 0),
    "no new privileges": prctl(PR_SET_NO_NEW_PRIVS, 1),
    "subreaper": prctl(PR_SET_CHILD_SUBREAPER, 1),
}


def used_after(name: str) -> None:
    BEFORE[name]()
    use()


@pytest.mark.crossing(every=3)
@pytest.mark.parametrize("name", BEFORE)
def test_after(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_child(used_after, name, budget_s=20)


def used_beside_forks() -> None:
    forking_threads()
    with Userfaultfd() as uffd, Region.anonymous(LENGTH) as region:
        for _ in range(3):
            with Handler(uffd, driver="process") as handler:
                handler.serve(region, CallableSource(sources.page))
                assert region.read(0, PAGE) == content(PAGE)
                os.kill(processes(handler)[0], signal.SIGKILL)
                # A fork has the other end of the socket, so its being open shows nothing.
                with pytest.raises(HelperLostError, match=r"SIGKILL|unknown"):
                    while True:
                        handler.stats()
                with pytest.raises(HelperLostError):
                    handler.stop()


def test_beside_forks() -> None:
    run_child(used_beside_forks, budget_s=30)


def fails(match: str) -> str:
    """Fail to make a handler, leave nothing behind, and return the message."""
    with no_leaks(), Userfaultfd() as uffd, pytest.raises(HelperLostError, match=match) as caught:
        Handler(uffd, driver="process")
    return str(caught.value)


def in_a_new_pid_namespace() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID):
        pytest.skip("unshare(CLONE_NEWPID) needs CAP_SYS_ADMIN")
    fails(r"another PID namespace \(unshare\(CLONE_NEWPID\)\)")


def test_in_a_new_pid_namespace() -> None:
    run_child(in_a_new_pid_namespace)


# How the interpreter was started

FLAGS: dict[str, tuple[list[str], dict[str, str]]] = {
    "isolated": (["-I"], {"PYTHONHOME": "/nowhere", "PYTHONPATH": "bad"}),
    "no environment": (["-E"], {"PYTHONPATH": "bad"}),
    "no site": (["-S"], {}),
    "optimised": (["-OO"], {}),
    "development": (["-X", "dev"], {}),
    "errors": (["-W", "error"], {}),
    "safe path": ([], {"PYTHONSAFEPATH": "1"}),
    "debug malloc": ([], {"PYTHONMALLOC": "debug"}),
    "inspect": ([], {"PYTHONINSPECT": "1"}),
    "faulthandler": (["-X", "faulthandler"], {}),
}
FLAGGED = """
import sys
sys.path += sys.argv[1:]
from pyuffd import CallableSource, Handler, Region, Userfaultfd

def function(offset, length):
    if not sys.flags.optimize:
        assert offset == 0
    return bytes([offset // 4096 + 1 + sys.flags.optimize]) * length

if __name__ == "__main__":
    with Userfaultfd() as uffd, Region.anonymous(8192) as region:
        with Handler(uffd, driver="process") as handler:
            handler.serve(region, CallableSource(function))
            print(region.read(0, 2))
"""


@pytest.mark.crossing(every=3)
@needs_kernel_faults()
@pytest.mark.parametrize("name", FLAGS)
def test_options_of_the_interpreter(name: str, tmp_path: Path) -> None:
    flags, env = FLAGS[name]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pickle.py").write_text("raise ImportError('not this one')")
    path = [entry for entry in sys.path if entry]
    done = run_program(tmp_path, FLAGGED, flags=flags, env=env, arguments=path)
    expected = bytes([3 if name == "optimised" else 1]) * 2
    assert (done.stdout, done.returncode) == (f"{expected!r}\n", 0), done.stderr
    assert done.stderr.replace(">>> ", "").strip() == ""


# Signals

TERMINATING = [
    number
    for number in signal.valid_signals()
    if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGCHLD)
    and number not in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
    and number not in (signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS)
]


def keeper_is_sent_signals() -> None:
    with serving(sources.page) as (handler, region):
        keeper, worker = processes(handler)
        for number in TERMINATING:
            os.kill(keeper, number)
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(worker, number)
        assert region.read() == content(LENGTH)
        assert processes(handler) == (keeper, worker)
        # The worker process dies of the signals that end any process; another one takes over.
        kill_worker(handler, signal.SIGTERM)
        assert handler.stats().restarts == 1


def test_signals_to_the_helper() -> None:
    run_child(keeper_is_sent_signals, budget_s=20)


def group_is_sent_signals() -> None:
    """As sent by a terminal, also when it hangs up, and by a shell's kill."""
    numbers = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP, signal.SIGTERM)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    with serving(sources.page) as (handler, region):
        before = processes(handler)
        for number in numbers:
            os.killpg(0, number)
        assert region.read() == content(LENGTH)
        assert processes(handler) == before


def test_signals_to_the_process_group() -> None:
    run_child(group_is_sent_signals)


def what_a_source_starts() -> None:
    with serving(sources.ignored_signals) as (_, region):
        # subprocess resets the signals that Python itself ignores.
        seen = region.read(0, 8)
        assert seen == bytes(8), seen.hex()


def test_what_a_source_starts_ignores_no_signal() -> None:
    run_child(what_a_source_starts)


# The text of HelperLostError


@contextlib.contextmanager
def interpreter(program: str) -> Iterator[None]:
    """Use a shell script as the interpreter."""
    path = Path.cwd() / "interpreter"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    before, sys.executable = sys.executable, str(path)
    try:
        yield
    finally:
        sys.executable = before


def start_fails(program: str, said: Sequence[str]) -> None:
    with interpreter(program):
        text = fails("^the helper process could not be started: ")
    for part in said:
        assert part in text, text


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("exit 3", ["exit code 3"]),
        ("echo one >&2; echo 'No module named encodings' >&2; exit 1", ["No module named enco"]),
        ("kill -SEGV $$", ["SIGSEGV"]),
        ("kill -KILL $$", ["SIGKILL", "for lack of memory"]),
    ],
    ids=["exit", "words", "crash", "killed"],
)
def test_a_helper_that_does_not_start(
    program: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_child(start_fails, program, said)
    assert result.stderr == ""


def no_interpreter(name: str) -> None:
    executable: Any = {"none": None, "empty": "", "missing": "/nowhere/python"}.get(name)
    if name == "forbidden":
        executable = "/proc/self/status"
    if name == "frozen":
        executable = sys.executable
        sys.frozen = True  # type: ignore[attr-defined]
    before, sys.executable = sys.executable, executable
    if name in ("missing", "forbidden"):
        fails(f"{executable}: (No such file|Permission denied)")
        return
    assert "driver='thread'" in fails("set_executable")
    from multiprocessing import spawn

    spawn.set_executable(f"{sys.prefix}/bin/python3" if name == "frozen" else before)
    use()


@pytest.mark.parametrize("name", ["none", "empty", "missing", "forbidden", "frozen"])
def test_without_an_interpreter(name: str) -> None:
    run_child(no_interpreter, name, budget_s=20)


def no_answer() -> None:
    from pyuffd.handlers.process import _link

    _link.START_LIMIT_S = 0.3
    with interpreter("exec sleep 100"):
        fails("no answer")


def test_a_helper_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_child(no_answer)


def warns_at_start() -> None:
    with Userfaultfd() as uffd, interpreter(f'echo "a warning" >&2; exec {sys.executable} "$@"'):
        Handler(uffd, driver="process").stop()


def test_what_it_says_at_its_start_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_child(warns_at_start).stderr == "a warning\n"


def lost(how: str) -> None:
    """The promise holds, and the error tells what happened."""
    logging.disable()
    if how == "unknown":
        ignored_children()
    if how == "orphans":  # this process must reap them, like the first one of a container
        prctl(PR_SET_CHILD_SUBREAPER, 1)()
        how = "SIGKILL"
    with no_leaks(), Userfaultfd() as uffd, Region.anonymous(LENGTH) as region:
        handler = Handler(uffd, driver="process")
        handler.serve(region, CallableSource(sources.page))
        handler.start()
        keeper, _ = processes(handler)
        pidfd = os.pidfd_open(keeper)
        os.kill(keeper, signal.SIGSEGV if how == "SIGSEGV" else signal.SIGKILL)
        select.select([pidfd], [], [])
        os.close(pidfd)
        with pytest.raises(HelperLostError) as caught:
            while True:
                handler.stats()
        assert how in str(caught.value)
        assert f"helper process {keeper} is gone" in str(caught.value)
        with pytest.raises(HelperLostError, match=how):
            handler.stop()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "unknown", "orphans"])
def test_how_the_helper_was_lost(how: str) -> None:
    run_child(lost, how)


def keeper_without_descriptors() -> None:
    """It cannot start another worker process and says so; missing pages are poisoned."""
    logging.disable()
    with no_leaks(), Userfaultfd() as uffd, Region.anonymous(LENGTH) as region:
        handler = Handler(uffd, driver="process")
        handler.serve(region, CallableSource(sources.page))
        keeper, worker = processes(handler)
        resource.prlimit(keeper, resource.RLIMIT_NOFILE, (5, 5))
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(HelperLostError, match="socketpair") as caught:
            while True:
                handler.stats()
        assert "RLIMIT_NOFILE" in str(caught.value)
        with pytest.raises(HelperLostError, match="socketpair"):
            handler.stop()


def test_a_keeper_that_cannot_start_a_worker() -> None:
    run_child(keeper_without_descriptors)


def stopped_helper() -> None:
    """A helper that does not end is killed, and leaves nothing behind."""
    from pyuffd.handlers.process import _link

    _link.EXIT_LIMIT_S = 0.5
    with no_leaks(), Userfaultfd() as uffd:
        handler = Handler(uffd, driver="process")
        engine = handler._engine
        assert isinstance(engine, RemoteEngine)
        keeper, _ = processes(handler)
        handler.start()
        os.kill(keeper, signal.SIGSTOP)
        engine.destroy()
        handler._engine = None
        uffd._let_close(id(handler))


def test_a_helper_that_hangs() -> None:
    result = run_child(stopped_helper)
    assert "killing it" in result.stderr


# The standard streams are ordinary descriptors


def low_numbers(driver: str) -> None:
    for fd in range(3):
        os.close(fd)
    python = driver in ("process", "thread")
    with no_leaks(), Userfaultfd() as uffd, Region.memfd(LENGTH) as region:
        assert uffd.fileno() == 0
        with Handler(uffd, driver=driver) as handler:  # type: ignore[arg-type]
            source: Any = CallableSource(sources.page) if python else BufferSource(content(LENGTH))
            handler.serve(region, source)
            assert region.read() == content(LENGTH)


@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_descriptors_with_the_numbers_of_streams(driver: str) -> None:
    run_child(low_numbers, driver)


@needs_kernel_faults()
def test_output_of_a_source(tmp_path: Path) -> None:
    """It goes to the same place as the program's."""
    program = FLAGGED.replace(
        "    return", "    print('asked for', offset, flush=True)\n    return"
    )
    path = [entry for entry in sys.path if entry]
    done = run_program(tmp_path, program, arguments=path)
    assert done.stdout == "asked for 0\nb'\\x01\\x01'\n"


def test_no_descriptor_is_inherited() -> None:
    run_child(inherited)


def inherited() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    with Userfaultfd() as uffd, Handler(uffd, driver="process") as handler:
        os.close(write)
        assert select.select([read], [], [], 0)[0] == [read]  # no other process has the other end
        assert handler.driver == "process"
    os.close(read)
