"""The command line: dispatch, exit statuses, the page of `doctor` and the keys of its JSON."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib.util
import io
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyuffd
from pyuffd import Feature, KernelSupport, cli
from pyuffd._errors import UffdOSError
from pyuffd._probe import OpenSupport
from pyuffd._refusals import YAMA, explain_device, explain_syscall, why_no_ptrace
from pyuffd.cli import _cgroup, _report, doctor
from pyuffd.cli import _report_types as keys
from pyuffd.lowlevel import DEVICE
from tests._child import ROOT, limit_s

KEY = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def documented_keys() -> set[str]:
    return set(KEY.findall((ROOT / "docs" / "doctor.md").read_text()))


def keys_of(kind: object, prefix: str = "") -> Iterator[str]:
    """Yield the key paths of a dataclass, in the notation of docs/doctor.md."""
    names = {"open": "<way>", "memory_types": "<type>", "memory_types.<type>": "<mode>"}
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list and dataclasses.is_dataclass(arguments[0]):
        yield from keys_of(arguments[0], f"{prefix}[]")
    elif typing.get_origin(kind) is dict:
        yield from keys_of(arguments[1], f"{prefix}.{names[prefix]}")
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        for name, inner in typing.get_type_hints(kind).items():
            yield from keys_of(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix


def report(**changes: Any) -> keys.Report:
    """Return the report of a machine on which nothing works."""
    refused = keys.Way(False, "EPERM", "a seccomp filter " * 12, "docker run " * 20)
    mode = keys.Mode(False, "EPERM", "0x0", [])
    values = keys.Report(
        schema=keys.SCHEMA,
        pyuffd=pyuffd.__version__,
        usable=False,
        kernel_faults=False,
        kernel=keys.Kernel("6.1.0", "x86_64"),
        user=keys.User(1000, [], True, True),
        open={"syscall": refused, "device": refused, "user_mode_only": refused},
        features=keys.Features("0x0", [], [], [], "0x0"),
        ioctls=keys.Mask("0x0", []),
        memory_types={"anon": {"MISSING": mode}, "shmem": {"MISSING": mode}},
        pagemap_scan=keys.Mask("0x0", []),
        memory=keys.Memory(1 << 30, 1 << 29),
        swap=keys.Swap(0, 0),
        huge_pages=[],
        hugetlbfs=[],
        shm=keys.Shm(None, None),
        thp=keys.Thp(None, None),
        limits=keys.Limits(65530, None, None, 1024, None, 0, 0, None),
        cgroup=_cgroup.Limits(64 << 20, 0, None, 1.5),
        cpus=keys.Cpus(4, 2),
        python=keys.Python("CPython", "3.13.0", True, False),
        missing=[keys.Missing("something", "of a long name " * 20, "command --option " * 20)],
    )
    return dataclasses.replace(values, **changes)


def page(of: keys.Report, *, colour: bool = False) -> list[str]:
    return list(doctor._Page(of, colour=colour).lines())


def command(run: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `pyuffd probe-me` run this function."""

    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        subparsers.add_parser("probe-me").add_argument("--flag", action="store_true")

    module = types.ModuleType("tests_command")
    vars(module).update(add_parser=add_parser, run=lambda args: run())
    monkeypatch.setitem(sys.modules, "tests_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe-me", ("tests_command", "a command of the tests"))


def raises(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


# Dispatch


def test_help_imports_no_command() -> None:
    source = (
        "import sys; from pyuffd.cli import COMMANDS, main; status = main(['--help']);"
        "assert not any(module in sys.modules for module, _ in COMMANDS.values());"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=limit_s(60),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name, (_, help_) in cli.COMMANDS.items():
        assert name in done.stdout
        assert help_.split()[0] in done.stdout


@pytest.mark.parametrize("module", ["pyuffd", "pyuffd.cli"])
def test_python_m(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        capture_output=True,
        text=True,
        timeout=limit_s(60),
        check=True,
    )
    assert done.stdout == f"pyuffd {pyuffd.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["doctor", "--no-such-option"]])
def test_usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert "usage: pyuffd" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["doctor"], ["--help"], ["conformance", "list"]])
def test_closed_stdout(argv: list[str]) -> None:
    """Whatever the program opened first would become its standard output."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "pyuffd", *argv],
        stderr=subprocess.PIPE,
        text=True,
        timeout=limit_s(60),
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch("pyuffd: standard output is closed[^\n]*\n", done.stderr)


def test_closed_stdout_and_stderr() -> None:
    command_line = [
        "sh",
        "-c",
        'exec "$@" >&- 2>&-',
        "sh",
        sys.executable,
        "-m",
        "pyuffd",
        "doctor",
    ]
    assert subprocess.run(command_line, timeout=limit_s(60), check=False).returncode == 2


def test_conformance_in_processes_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "xdist" else find(name)
    )
    assert cli.main(["conformance", "run", "-n", "2", "-k", "nothing"]) == 2
    assert "pip install 'pyuffd[testing]'" in capsys.readouterr().err


def test_command_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_status_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command(lambda: 7, monkeypatch)
    assert cli.main(["probe-me", "--flag"]) == 7


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            UffdOSError(errno.EINVAL, "UFFDIO_COPY", 0x1000, 0x2000),
            "UFFDIO_COPY [0x1000, +0x2000): Invalid argument",
        ),
        (pyuffd.ClosedError("this userfaultfd is closed"), "this userfaultfd is closed"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/some/file"), "/some/file: No such file"),
    ],
)
def test_expected_error_is_one_sentence(
    error: Exception,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(raises(error), monkeypatch)
    assert cli.main(["probe-me"]) == 2
    assert capsys.readouterr() == ("", f"pyuffd: {text}\n")


def test_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command(raises(ZeroDivisionError()), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe-me"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    command(raises(KeyboardInterrupt()), monkeypatch)
    assert cli.main(["probe-me"]) == 130


# The report


def test_documented_keys_are_those_of_the_report() -> None:
    assert documented_keys() == set(keys_of(keys.Report))


def test_every_feature_has_advice() -> None:
    assert set(_report.FEATURE_SINCE) == set(Feature)


def test_missing_features_are_grouped_by_version() -> None:
    support = pyuffd.KernelSupport(
        release="6.1",
        features=Feature(sum(Feature)) & ~(Feature.RWP | Feature.RWP_ASYNC | Feature.MOVE),
        refused=Feature(0),
        ioctls=pyuffd.Ioctl(0),
        opens={"syscall": _open(True)},
        memory={},
        scan_categories=pyuffd.PageCategory.WRITTEN,
    )
    assert [missing.what for missing in _report._missing_features(support)] == [
        "MOVE",
        "RWP, RWP_ASYNC",
    ]


def test_nothing_is_called_missing_where_nothing_could_be_asked() -> None:
    support = pyuffd.KernelSupport(
        release="6.1",
        features=Feature(0),
        refused=Feature(0),
        ioctls=pyuffd.Ioctl(0),
        opens={"syscall": _open(False)},
        memory={},
        scan_categories=pyuffd.PageCategory.WRITTEN,
    )
    assert list(_report._missing_features(support)) == []


def _open(works: bool) -> OpenSupport:
    return OpenSupport(works, 0 if works else errno.EPERM)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (4096, "4 KiB"), (1536 << 20, "1.5 GiB"), (3 << 50, "3072 TiB")],
)
def test_size_text(size: int, text: str) -> None:
    assert _report.size_text(size) == text


# Why opening is refused

DOCKER = "docker run --security-opt seccomp=profile.json --device /dev/userfaultfd"


@pytest.mark.parametrize(
    ("code", "privilege_would_do", "seccomp", "reason", "command"),
    [
        (errno.EPERM, True, False, "CAP_SYS_PTRACE", "sysctl vm.unprivileged_userfaultfd=1"),
        (errno.EPERM, True, True, "CAP_SYS_PTRACE", "sysctl vm.unprivileged_userfaultfd=1"),
        (errno.EPERM, False, True, "seccomp", DOCKER),
        (errno.ENOSYS, False, True, "seccomp", DOCKER),
        (errno.ENOSYS, False, False, "CONFIG_USERFAULTFD", ""),
        (errno.EPERM, False, False, "security module", ""),
        (errno.EINVAL, False, False, "Linux 5.11", ""),
        (errno.EMFILE, False, False, "Too many open files", ""),
    ],
)
def test_refusal_of_the_system_call_is_explained(
    code: int,
    privilege_would_do: bool,
    seccomp: bool,
    reason: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyuffd._refusals._has_seccomp_filter", lambda: seccomp)
    found_reason, found_command = explain_syscall(code, privilege_would_do)
    assert reason in found_reason
    assert found_command == command


@pytest.mark.parametrize(
    ("seccomp", "minor", "reason", "command"),
    [
        (False, None, "this kernel has no such device", ""),
        (True, None, "this kernel has no such device", ""),
        (False, 257, "there is no node for it", "mknod -m 600 /dev/userfaultfd c 10 257"),
        (True, 257, "as in containers", "docker run --device /dev/userfaultfd"),
    ],
)
def test_why_there_is_no_device(
    seccomp: bool, minor: int | None, reason: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyuffd._refusals._has_seccomp_filter", lambda: seccomp)
    monkeypatch.setattr("pyuffd._refusals._misc_minor", lambda name: minor)
    found_reason, found_command = explain_device(errno.ENOENT)
    assert reason in found_reason
    assert found_command == command


def test_commands_for_root_use_ids_of_the_parent_user_namespace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Root of the host runs them, to whom uid 0 of this namespace is another user."""
    maps = {"/proc/self/uid_map": "0 100000 65536\n", "/proc/self/gid_map": "0 200000 65536\n"}
    monkeypatch.setattr("pyuffd._refusals.read_text", maps.__getitem__)
    monkeypatch.setattr("pyuffd.cli._report._text", lambda path: maps[str(path)])
    uid, gid = os.geteuid(), os.getegid()
    if Path(DEVICE).exists():
        assert explain_device(errno.EACCES)[1] == f"chown {100000 + uid} {DEVICE}"
    support = KernelSupport(
        release="6.1",
        features=Feature(0),
        refused=Feature.EVENT_FORK,
        ioctls=pyuffd.Ioctl(0),
        opens={},
        memory={},
        scan_categories=pyuffd.PageCategory.WRITTEN,
    )
    command = next(iter(_report._missing_features(support))).command
    assert f"--reuid={100000 + uid} --regid={200000 + gid} " in str(command)


@pytest.mark.parametrize(
    ("owner", "yama", "attaching", "reason"),
    [
        (4242, "1", True, "process 7 belongs to another user (uid 4242): run as root, or with"),
        (4242, "0", False, "process 7 belongs to another user (uid 4242): run as root, or with"),
        (None, "1", True, "ptrace_scope is 1: run as root, or with CAP_SYS_PTRACE, or `sysctl ker"),
        (None, "3", True, "ptrace_scope is 3: no process may be traced"),
        (None, "1", False, "process 7 may not be read or traced by its own user"),
    ],
)
def test_why_another_process_may_not_be_traced(
    owner: int | None, yama: str, attaching: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.geteuid() if owner is None else owner
    texts = {"/proc/7/status": f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n", YAMA: yama}
    monkeypatch.setattr("pyuffd._refusals.read_text", texts.__getitem__)
    assert reason in why_no_ptrace(7, attaching=attaching)


def test_one_seccomp_filter_is_one_missing_thing() -> None:
    refused = OpenSupport(False, errno.EPERM, "a seccomp filter", "docker run")
    device = OpenSupport(False, errno.ENOENT, "no device", "mknod")
    support = pyuffd.KernelSupport(
        release="6.1",
        features=Feature(0),
        refused=Feature(0),
        ioctls=pyuffd.Ioctl(0),
        opens={"syscall": refused, "device": device, "user_mode_only": refused},
        memory={},
        scan_categories=pyuffd.PageCategory.WRITTEN,
    )
    missing = list(_report._missing_ways(support))
    assert keys.Missing("the userfaultfd system call", "a seccomp filter", "docker run") in missing
    assert len(missing) == 2  # the device is the other
    works = dataclasses.replace(support, opens={**support.opens, "device": OpenSupport(True)})
    assert not list(_report._missing_ways(works))  # one way suffices


# The page


def test_page_is_complete_and_fits_where_nothing_works() -> None:
    lines = page(report())
    assert max(map(len, lines)) <= doctor.WIDTH
    text = " ".join(" ".join(lines).split())
    assert "userfaultfd cannot be used here." in text
    assert text.count("EPERM: a seccomp filter") == 3
    assert "memory 64 MiB, swap 0 B, 1.5 CPUs" in text
    assert "in a user namespace, under a seccomp filter" in text
    assert "3.13.0 free-threaded: the GIL is off" in text


def test_page_continues_a_long_command_so_that_a_shell_reads_it_whole() -> None:
    wanted = "command " + " ".join(f"--option-{number}" for number in range(30))
    lines = page(report(missing=[keys.Missing("something", "is gone", wanted)]))
    shown = "\n".join(lines).partition("    # ")[2]
    assert "\\\n" in shown
    assert shown.replace("\\\n", "").split() == wanted.split()


def test_page_names_what_this_user_is_refused_apart() -> None:
    features = keys.Features("0x3", ["PAGEFAULT_FLAG_WP", "EVENT_FORK"], [], ["EVENT_FORK"], "0x0")
    lines = page(report(usable=True, features=features))
    assert [line.split() for line in lines if "EVENT_FORK" in line] == [
        ["not", "for", "this", "user", "EVENT_FORK"]
    ]
    assert any("user_mode_only=True" in line for line in lines)


def test_page_shows_bits_without_a_name() -> None:
    features = keys.Features("0x8000000000000000", [], [], [], "0x8000000000000000")
    lines = page(report(usable=True, kernel_faults=True, features=features))
    assert any(line.split() == ["without", "a", "name", "0x8000000000000000"] for line in lines)


def test_colours_only_add_escapes() -> None:
    plain, coloured = page(report()), page(report(), colour=True)
    assert plain != coloured
    assert plain == [re.sub(r"\x1b\[\d+m", "", line) for line in coloured]


@pytest.mark.parametrize(
    ("tty", "environment", "wanted"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_wants_colour(
    tty: bool, environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: tty)
    assert doctor._wants_colour(stream) == wanted


# Control groups


def make_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def make_proc(tmp_path: Path, groups: str, mounts: str) -> Path:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(mounts)
    return proc


def test_cgroup_v2_takes_the_tightest_limit_of_all_levels(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    make_group(top)
    make_group(top / "outer", memory__max="1073741824", cpu__max="150000 100000")
    make_group(
        top / "outer" / "inner",
        memory__max="max",
        memory__swap__max="0",
        cpu__max="max 100000",
        hugetlb__2MB__max="4194304",
    )
    proc = make_proc(tmp_path, "0::/outer/inner\n", f"40 31 0:37 / {top} rw - cgroup2 cgroup2 rw\n")
    assert _cgroup.limits(proc) == _cgroup.Limits(1 << 30, 0, 4 << 20, 1.5)


def test_cgroup_v1(tmp_path: Path) -> None:
    memory, cpu = tmp_path / "memory", tmp_path / "cpu"
    make_group(memory, memory__limit_in_bytes="9223372036854771712")
    make_group(
        memory / "job",
        memory__limit_in_bytes="41943040",
        memory__memsw__limit_in_bytes="104857600",
    )
    make_group(cpu / "job", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    make_group(cpu, cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    proc = make_proc(
        tmp_path,
        "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n",
        f"35 31 0:32 / {memory} rw - cgroup cgroup rw,memory\n"
        f"32 31 0:29 / {cpu} rw - cgroup cgroup rw,cpu,cpuacct\n",
    )
    assert _cgroup.limits(proc) == _cgroup.Limits(40 << 20, 60 << 20, None, 0.5)


def test_cgroup_of_a_container_that_sees_only_its_own(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    make_group(top, memory__max="1048576")
    proc = make_proc(
        tmp_path, "0::/../elsewhere\n", f"40 31 0:37 / {top} rw - cgroup2 cgroup2 rw\n"
    )
    assert _cgroup.limits(proc) == _cgroup.Limits(1 << 20, None, None, None)


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert _cgroup.limits(make_proc(tmp_path, "", "")) == _cgroup.Limits(None, None, None, None)


@pytest.mark.parametrize("lacks", ["google", "google.protobuf"])
def test_restores_of_criu_without_protobuf(lacks: str) -> None:
    for program, status in (
        ("from pyuffd.cli import main; sys.exit(main(['criu-lazy-pages']))", 2),
        ("import pyuffd.criu", 1),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.modules[{lacks!r}] = None; {program}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status
        assert "protobuf: pip install 'pyuffd[criu]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "frozen"), [("", True), ("['--version']", False)])
def test_ends_without_a_last_collection(arguments: str, frozen: bool) -> None:
    """In a process that has nothing else to do; a program that calls main() continues."""
    program = (
        "import gc; from pyuffd.cli import main;"
        f" main({arguments}); print(gc.get_freeze_count() > 1000)"
    )
    command = [sys.executable, "-c", program, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pyuffd", pyuffd.__version__, str(frozen)]
