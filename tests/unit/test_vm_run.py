"""tests/vm/run: the ways in which a guest can end; a program in place of QEMU imitates it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.vm import _command, _image, _run
from tests.vm._run import Guest, Result, Status

# The fake finds its ports among QEMU's arguments, as QEMU does.
FAKE = """#!/bin/sh
for word; do case $word in
file:control) control=control;;
file:archive) archive=archive;;
esac; done
say() { echo "$*" >> "$control"; }
"""
SEND = "mkdir -p $T/out && echo '{}' > $T/out/report.json && tar -czf $archive -C $T/out .\n"
UP = "say up 4.2\n"
IN_THE_GUEST = ("--junitxml=/out/junit.xml", "--uffd-report=/out/report.json")


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayGuest:
    return PlayGuest(tmp_path, monkeypatch)


class PlayGuest:
    """Run a guest whose QEMU is this script."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.console = bytearray()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(_image, "build", lambda path, job, *_: path.write_bytes(job))

    def __call__(
        self, script: str, *, run_s: float = 20.0, boot_scale: float = 1.0, **more: Any
    ) -> Result:
        fake = self.folder / _run.QEMU
        fake.write_text(FAKE + f"T={self.folder}\n" + script)
        fake.chmod(0o755)
        kernel = self.folder / "vmlinuz"
        kernel.touch()
        guest = Guest(
            kernel,
            self.folder / "files",
            scale=boot_scale,
            run_s=run_s / boot_scale,
            show=self.console.extend,
            **more,
        )
        return guest.run(["true"])


def test_the_command_s_status_and_files_come_back(play: PlayGuest) -> None:
    result = play(UP + "say swap /dev/nvme0n1\nprintf 'hello\\r\\n'\n" + SEND + "say status 3\n")
    assert (result.status, result.sentence) == (3, "")
    assert result.notes["swap"] == "/dev/nvme0n1"
    assert (result.folder / "report.json").read_text() == "{}\n"
    assert (result.folder / "console.log").read_bytes() == b"hello\n" == bytes(play.console)
    assert sorted(path.name for path in result.folder.iterdir()) == ["console.log", "report.json"]


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo 'not a kernel'", Status.NO_BOOT, "not a kernel"),
        ("echo 'Kernel panic - not syncing: VFS: Unable to mount root fs'", 113, "1536 MiB"),
        ("echo 'qemu: initrd is too large, cannot support'", Status.NOT_UNPACKED, "memory"),
        ("say incomplete", Status.NOT_UNPACKED, "memory"),
        (UP + "say no-userfaultfd", Status.NO_USERFAULTFD, "CONFIG_USERFAULTFD"),
        (UP + "echo 'Kernel panic'", Status.DIED, "console.log"),
        # A status without all of the files is no end of a run.
        (UP + "say status 0", Status.DIED, "console.log"),
        (UP + SEND + "truncate -s 20 $archive; say status 0", Status.DIED, "console.log"),
        ("say no-python 127", Status.NO_BOOT, "127"),
    ],
)
def test_each_failure_has_its_status_and_sentence(
    play: PlayGuest, script: str, status: int, words: str
) -> None:
    result = play(script + "\n")
    assert result.status == status
    assert words in result.sentence


def test_a_guest_that_does_not_come_up_is_ended(play: PlayGuest) -> None:
    result = play("echo waiting; exec sleep 100\n", boot_scale=0.1)
    assert result.status == Status.NO_BOOT
    assert result.sentence.endswith("waiting")


def test_a_run_that_hangs_is_ended(play: PlayGuest) -> None:
    result = play(UP + "exec sleep 100\n", run_s=0.5)
    assert result.status == Status.HANG


def test_a_guest_that_says_nothing_any_more_is_ended(play: PlayGuest) -> None:
    result = play(UP + "echo hello; exec sleep 100\n", quiet_s=0.3)
    assert (result.status, result.sentence) == (Status.HANG, "the guest stopped printing anything")


def test_a_guest_has_to_end_in_time(play: PlayGuest) -> None:
    result = play(UP + "exec sleep 100\n", until=time.monotonic() + 5)
    assert result.status == Status.HANG


def test_a_guest_whose_clock_counts_is_late_by_the_cpu_it_had(play: PlayGuest) -> None:
    result = play(UP + "sleep 2\n" + SEND + "say status 0\n", run_s=1.5, counted=True)
    assert (result.status, result.sentence) == (0, "")
    result = play(UP + "while :; do :; done\n", run_s=0.5, counted=True)
    assert result.status == Status.HANG


def test_the_clock_of_several_cpus_is_the_host_s(tmp_path: Path) -> None:
    def options(**more: Any) -> list[str]:
        guest = Guest(tmp_path, tmp_path, **more)
        return guest._qemu_options(tmp_path / "initramfs", tmp_path / "swap")

    assert "-icount" in options(counted=True)
    assert "-icount" not in options()
    assert "-icount" not in options(counted=True, cpus=2, accel=_run.MULTI)
    assert "q35,mem-merge=off" in options()


def test_a_guest_that_is_done_but_does_not_power_off_is_ended(
    play: PlayGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "END_S", 0.2)
    result = play(UP + SEND + "say status 0\nexec sleep 100\n")
    assert (result.status, result.sentence) == (0, "")


def test_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = Guest(tmp_path, tmp_path / "files").run(["true"])
    assert result.status == Status.QEMU_ABSENT
    assert "apt-get install qemu-system-x86" in result.sentence


def test_without_a_kernel(play: PlayGuest, tmp_path: Path) -> None:
    play("exit 0\n")
    result = Guest(tmp_path / "absent", tmp_path / "files").run(["true"])
    assert result.status == Status.NO_SUCH_KERNEL


def test_statuses_are_not_pytest_s() -> None:
    assert not {int(status) for status in Status} & {int(code) for code in pytest.ExitCode}


def test_report_files_go_where_they_are_brought_back_from() -> None:
    arguments, wanted = _run.redirect(["tests", "--junitxml=/a/b.xml", "--uffd-report", "c.html"])
    assert arguments == ["tests", *IN_THE_GUEST]
    assert wanted == {
        "junit.xml": Path("/a/b.xml"),
        "report.json": Path("c.json"),
        "report.html": Path("c.html"),
    }


def test_reports_are_always_written() -> None:
    assert _run.redirect(["-k", "x=y"]) == (["-k", "x=y", *IN_THE_GUEST], {})


def test_test_files_from_outside_the_tree(tmp_path: Path) -> None:
    inside = _run.ROOT / "tests/unit"
    test = tmp_path / "mine/test_mine.py"
    test.parent.mkdir()
    test.write_text("def test(): pass\n")
    (tmp_path / "mine/conftest.py").write_text("")
    expression = " or ".join(["x"] * 100)
    given = [str(inside), f"{test}::test", "-k", expression]
    arguments, files = _command.from_outside(given, _run.ROOT)
    assert arguments == given
    assert files == {str(test): b"def test(): pass\n", str(test.parent / "conftest.py"): b""}
    assert sorted(_command.from_outside([str(test.parent)], _run.ROOT)[1]) == sorted(files)


def test_what_is_lacking_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run", "6.12"])
    monkeypatch.setattr(_command, "find_kernel", lambda name: pytest.fail("fetched"))
    assert _command.main() == Status.QEMU_ABSENT
    assert "apt-get install qemu-system-x86" in capsys.readouterr().err


def test_two_cpus_have_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_run.ACCEL, raising=False)
    assert (_run.accel(1), _run.accel(2)) == (_run.SINGLE, _run.MULTI)


def test_the_user_s_accelerator(play: PlayGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYUFFD_BUDGET_SCALE", raising=False)
    monkeypatch.setenv(_run.ACCEL, "kvm")
    assert (_run.accel(1), _run.accel(2)) == ("kvm", "kvm")
    assert (_run.scale("kvm"), _run.scale(_run.SINGLE)) == (2.0, 20.0)
    # Only an emulated CPU can count its instructions.
    play('echo "$@"\n' + UP, accel=_run.accel(1), counted=True)
    assert b"-accel kvm" in play.console
    assert b"-icount" not in play.console


@pytest.mark.parametrize("works", [False, True])
def test_a_fresh_clone_makes_its_environment_first(tmp_path: Path, works: bool) -> None:
    clone = tmp_path / "clone"
    (clone / "tests/vm").mkdir(parents=True)
    script = clone / "tests/vm/run"
    script.write_bytes((_run.ROOT / "tests/vm/run").read_bytes())
    programs = tmp_path / "bin"
    programs.mkdir()
    # What it makes is a Python that says how it was called.
    made = "mkdir -p .venv/bin && printf '#!/bin/sh\\necho made $2\\n' > .venv/bin/python"
    make = f"#!/bin/sh\necho make $*\ncd {clone} && {made} && chmod +x .venv/bin/python\n"
    (programs / "make").write_text(make if works else "#!/bin/sh\nexit 2\n")
    (programs / "make").chmod(0o755)
    base = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run(
        [base, "-I", script, "6.12"],
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert ".venv/.installed-test" in done.stderr
    if works:
        assert (done.returncode, done.stdout) == (0, "made 6.12\n")
    else:
        assert done.returncode == Status.HOST_LACKS
        assert "nothing was fetched" in done.stderr
