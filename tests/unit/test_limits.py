"""Which limit made a system call fail."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from pyuffd import PartialResolveError, UffdOSError, UffdPermissionError, _limits
from pyuffd._errors import limit_met
from pyuffd.handlers.process._start import how_killed

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without limits; user 7 has three threads."""
    monkeypatch.setattr(_limits, "PROC", tmp_path)
    monkeypatch.setattr(_limits, "CGROUPS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(os, "getuid", lambda: 7)
    monkeypatch.setattr(resource, "getrlimit", lambda number: UNLIMITED)
    for name in ("self/ns", "sys/kernel", "12", "13", "cgroup/a/b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("pid", "pid_for_children"):
        (tmp_path / "self/ns" / name).symlink_to("pid:[1]")
    (tmp_path / "sys/kernel/threads-max").write_text("1000\n")
    (tmp_path / "loadavg").write_text("0.1 0.2 0.3 1/300 4000\n")
    (tmp_path / "self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "self/status").write_text("Name:\tpython\nSeccomp:\t0\n")
    (tmp_path / "12/status").write_text("Uid:\t7\t0\t0\t0\nThreads:\t3\n")
    (tmp_path / "13/status").write_text("Uid:\t8\t7\t7\t7\nThreads:\t5\n")
    return tmp_path


def limit(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    wanted = getattr(resource, name)
    monkeypatch.setattr(
        resource,
        "getrlimit",
        lambda number: (value, value) if number == wanted else UNLIMITED,
    )


def test_the_limit_of_a_user(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "RLIMIT_NPROC", 4)
    text = "RLIMIT_NPROC is 4, and user 7 has 3 processes and threads: raise it (`ulimit -u`)"
    for call in ("fork", "vfork", "clone", "pthread_create"):
        assert _limits.why(errno.EAGAIN, call) == text


@pytest.mark.parametrize("where", ["a/b", "a", ""])
def test_the_limit_of_a_cgroup(machine: Path, where: str) -> None:
    (machine / "cgroup" / where / "pids.max").write_text("20\n")
    (machine / "cgroup" / where / "pids.current").write_text("20\n")
    text = f"pids.max of the cgroup /{where} is 20, and 20 are used: raise it"
    assert _limits.why_no_task() == text


def test_old_cgroups(machine: Path) -> None:
    (machine / "self/cgroup").write_text("5:cpu,pids:/c\n3:memory:/d\n")
    (machine / "cgroup/pids/c").mkdir(parents=True)
    (machine / "cgroup/pids/c/pids.max").write_text("9\n")
    (machine / "cgroup/pids/c/pids.current").write_text("9\n")
    assert _limits.why_no_task().startswith("pids.max of the cgroup /c is 9")


def test_no_limit_is_met(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage has shrunk since the failure, so the text names all limits."""
    limit(monkeypatch, "RLIMIT_NPROC", 400)
    (machine / "cgroup/a/pids.max").write_text("max\n")
    (machine / "cgroup/pids.current").write_text("7\n")
    text = _limits.why_no_task()
    assert text.startswith("RLIMIT_NPROC is 400, ")
    assert text.endswith("; kernel.threads-max is 1000, and there are 300")


def test_another_pid_namespace(machine: Path) -> None:
    (machine / "self/ns/pid_for_children").unlink()
    (machine / "self/ns/pid_for_children").symlink_to("pid:[2]")
    assert "unshare(CLONE_NEWPID)" in _limits.why_no_task()


def test_a_filter(machine: Path) -> None:
    assert _limits.why(errno.EPERM, "pidfd_open") == ""
    assert _limits.why(errno.ENOSYS, "pidfd_open") == "this kernel has no pidfd_open"
    (machine / "self/status").write_text("Seccomp:\t2\n")
    for code in (errno.EPERM, errno.ENOSYS):
        assert "seccomp filter" in _limits.why(code, "pidfd_open")
        assert _limits.why(code, "pidfd_open").endswith("must allow pidfd_open")


def test_nothing_can_be_read(machine: Path) -> None:
    (machine / "loadavg").unlink()
    assert _limits.why(errno.EAGAIN, "fork") == ""


@pytest.mark.parametrize(
    ("code", "name"), [(errno.EMFILE, "RLIMIT_NOFILE"), (errno.EFBIG, "RLIMIT_FSIZE")]
)
def test_limits_that_the_errno_tells(code: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, name, 20)
    assert limit_met(code).startswith(f"{name} and its hard limit are 20 ")
    assert _limits.why(code, "whatever") == limit_met(code)
    monkeypatch.setattr(resource, "getrlimit", lambda number: UNLIMITED)
    assert limit_met(code) == ""


def test_exceptions_of_python(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "RLIMIT_NOFILE", 20)
    assert "RLIMIT_NOFILE" in _limits.why_error(OSError(errno.EMFILE, "too many"))
    assert _limits.why_error(LookupError()) == ""


def test_classes(machine: Path) -> None:
    with pytest.raises(UffdOSError, match="clone") as caught:
        _limits.raise_start_error("start", errno.EAGAIN, "clone")
    assert not isinstance(caught.value, PartialResolveError)
    assert caught.value.errno == errno.EAGAIN
    with pytest.raises(UffdPermissionError):
        _limits.raise_start_error("start", errno.EPERM, "clone")


def test_a_thread_that_cannot_start(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with pytest.raises(UffdOSError, match="pthread_create") as caught:
        _limits.start_thread(NoThread(name="uffd-w3-0"))
    assert caught.value.errno == errno.EAGAIN
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_name_that_is_not_utf8(machine: Path) -> None:
    """Any process may give itself any name; the limit was not told then."""
    (machine / "self/status").write_bytes(b"Name:\t\xff\nSeccomp:\t2\n")
    assert "under a seccomp filter" in _limits._why_refused(errno.EPERM, "clone")


def test_no_threads_at_all(machine: Path) -> None:
    """In an isolated sub-interpreter it is no limit that prevents a thread."""

    class Isolated(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("thread is not supported for isolated subinterpreters")

    with pytest.raises(UffdOSError, match="isolated subinterpreters") as caught:
        _limits.start_thread(Isolated())
    assert caught.value.errno == errno.EOPNOTSUPP
    assert "threads-max" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (3, 3, "by a process, perhaps itself, and not by the kernel for lack of memory"),
        (3, 4, "the kernel has killed 1 process for lack of memory meanwhile: see dmesg"),
        (3, 5, "the kernel has killed 2 processes for lack of memory meanwhile: see dmesg"),
        (-1, 5, "by another process, or by the kernel for lack of memory: see dmesg"),
    ],
)
def test_who_may_have_killed_a_process(
    before: int, now: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vmstat").write_text(f"nr_free_pages 7\noom_kill {now}\nzone_reclaim_success 0\n")
    monkeypatch.setattr(_limits, "PROC", tmp_path)
    assert how_killed(signal.SIGKILL, before) == f"was killed by SIGKILL ({said})"
    assert how_killed(signal.SIGSEGV, before) == "was killed by SIGSEGV"
