"""Run pytest on another kernel, in a QEMU guest: emulated unless the user says otherwise."""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from tests.vm import _clock, _image

ROOT = _image.ROOT
QEMU = "qemu-system-x86_64"
GUEST_OUT = "/out"

# One thread for all CPUs is faster on a busy machine, but runs only one CPU at a time.
SINGLE, MULTI = "tcg,thread=single", "tcg,thread=multi"
# The environment variable that selects another accelerator for all guests.
ACCEL = "PYUFFD_VM_ACCEL"
# The clock of a guest counts its instructions, 8 ns each. It stops while the host does not run
# QEMU, and jumps to the next timer when the guest is idle. So a busy host makes no test late, and a
# wait in vain ends soon.
COUNTED = ("-icount", "shift=3,sleep=off")

# Time limits, in the guest and here, are those of real hardware times one factor. A guest under
# emulation is 10 to 25 times slower.
EMULATION_SCALE = 20.0
VIRTUAL_SCALE = 2.0
BOOT_S = 6.0
RUN_S = 60.0
# How long QEMU may take to end after the guest has said that it is done.
END_S = 10.0
_POLL_S = 0.5

# The root file system is a tmpfs of at most half the memory, and holds the unpacked image.
MEMORY_MIB = 1536
HUGE_PAGE_MIB = 2
HUGE_PAGES = 128
SWAP_MIB = 512

# pytest's arguments for the conformance suite. A case that stalls ends its process, so the cases
# run in a worker of xdist, which is then replaced.
PLUGIN = ("-p", "pyuffd.conformance.plugin")
SUITE = ("--pyargs", "pyuffd.conformance.test_suite", "-n", "1", "-q")

# What QEMU or the kernel prints if the initramfs does not fit or cannot be used.
_NOT_UNPACKED = (
    "initrd is too large",
    "System is deadlocked on memory",
    "Initramfs unpacking failed",
    "Unable to mount root fs",
    "No working init found",
    "invalid magic at start of compressed archive",
)
# The files that a run leaves in its folder.
FILES = (
    "control",
    "archive",
    "console.log",
    "dmesg.txt",
    "junit.xml",
    "report.json",
    "report.html",
    "gcov.tar",
)
_CONSOLE_NOISE = re.compile(rb"\x1b(\[[0-9;?=]*[A-Za-z]|c)|\r")


class Status(IntEnum):
    """The exit status of `run`, if it is not pytest's (0 to 5)."""

    QEMU_ABSENT = 110
    NO_SUCH_KERNEL = 111
    NO_BOOT = 112
    NOT_UNPACKED = 113
    NO_USERFAULTFD = 114
    HANG = 115
    DIED = 116
    HOST_LACKS = 117


@dataclass
class Result:
    """How a guest ended.

    Attributes:
        status: pytest's exit status or a `Status`.
        sentence: what went wrong, "" if pytest ended by itself.
        folder: where the files are: console.log, and after a complete run what the tests wrote.
        notes: what the guest reported about itself: swap, huge pages.
        boot_s: seconds until user space was up.
        wall_s: seconds from start to end.
    """

    status: int
    sentence: str
    folder: Path
    notes: dict[str, str] = field(default_factory=dict)
    boot_s: float = 0.0
    wall_s: float = 0.0


@dataclass
class Guest:
    """A guest to be started.

    Attributes:
        kernel: vmlinuz or bzImage.
        folder: where the files of the run go; those of an earlier run are deleted.
        memory_mib: memory in addition to the huge pages.
        huge_pages: how many 2 MiB pages it reserves at boot.
        swap_mib: size of its swap.
        accel: QEMU's -accel.
        scale: factor on every time limit, in the guest and here.
        boot_s: limit for the boot on real hardware; multiplied by `scale`.
        run_s: limit for the run on real hardware; multiplied by `scale`.
        packages: more installed distributions to pack.
        files: more files for the guest, by absolute path.
        cpus: how many CPUs it has.
        counted: its clock counts instructions, if it has one CPU; then the limits apply to QEMU's
            CPU time.
        quiet_s: limit for silence on the console, by the same clock as the others.
        until: when it must end, by `time.monotonic`.
        stop: ends it earlier when set.
        show: called with the console's output.
    """

    kernel: Path
    folder: Path
    memory_mib: int = MEMORY_MIB
    huge_pages: int = HUGE_PAGES
    swap_mib: int = SWAP_MIB
    accel: str = SINGLE
    scale: float = EMULATION_SCALE
    boot_s: float = BOOT_S
    run_s: float = RUN_S
    packages: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)
    cpus: int = 1
    counted: bool = False
    quiet_s: float = math.inf
    until: float = math.inf
    stop: threading.Event = field(default_factory=threading.Event)
    show: Callable[[bytes], object] = lambda data: None

    @property
    def is_counted(self) -> bool:
        """Whether its clock counts instructions, which several threads cannot do."""
        return self.counted and self.cpus == 1 and self.accel == SINGLE

    def pytest(self, *arguments: str) -> Result:
        """Run pytest with these arguments, paths relative to the repository."""
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
        return self.run([*pytest, *PLUGIN, *arguments])

    def run(self, command: list[str]) -> Result:
        """Boot, run a command, fetch its files.

        Raises:
            _image.MissingOnHostError: something that belongs in the image is not on this machine.
        """
        qemu = shutil.which(QEMU)
        if qemu is None:
            return self._ended(
                Status.QEMU_ABSENT,
                f"there is no {QEMU} here (apt-get install qemu-system-x86)",
            )
        if not self.kernel.is_file():
            return self._ended(Status.NO_SUCH_KERNEL, f"there is no kernel {self.kernel}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)
        initramfs, swap = self.folder / "initramfs", self.folder / "swap"
        try:
            _image.build(initramfs, self._job(command), self.packages, self.files)
            with swap.open("wb") as file:
                file.truncate(self.swap_mib << 20)
            return _Watch(self, [qemu, *self._qemu_options(initramfs, swap)]).result()
        finally:
            initramfs.unlink(missing_ok=True)
            swap.unlink(missing_ok=True)

    def _job(self, command: list[str]) -> bytes:
        env = {
            "PYUFFD_BUDGET_SCALE": f"{self.scale:g}",
            # The guest already has its huge pages and swap.
            "PYUFFD_TESTS_RESERVE": "no",
            "PYUFFD_TESTS_DISPOSABLE": "yes",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "100",
        }
        for name, value in os.environ.items():
            if name.startswith("PYUFFD_TESTS"):
                env.setdefault(name, value)
        swap_bytes = self.swap_mib << 20
        job = {"command": command, "env": env, "cwd": str(ROOT), "swap_bytes": swap_bytes}
        return json.dumps(job).encode()

    def _qemu_options(self, initramfs: Path, swap: Path) -> list[str]:
        # Name files relative to the folder of the run: a comma in a path would end an option.
        memory = self.memory_mib + HUGE_PAGE_MIB * self.huge_pages
        append = f"console=ttyS0 quiet panic=-1 no_timer_check hugepages={self.huge_pages}"
        serial = ("stdio", "file:control", "file:archive")
        return [
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            # Otherwise ksmd would scan the guest's memory, and tests on this machine wait for ksmd.
            *("-machine", "q35,mem-merge=off", "-accel", self.accel, "-cpu", "max"),
            *(COUNTED if self.is_counted else ()),
            *("-smp", str(self.cpus)),
            *("-m", f"{memory}M", "-kernel", str(self.kernel.resolve()), "-initrd", initramfs.name),
            *(word for port in serial for word in ("-serial", port)),
            # NVMe, as it is built into Debian's cloud kernels; virtio_blk is a module there.
            *("-drive", f"file={swap.name},if=none,id=swap,format=raw,cache=unsafe"),
            *("-device", "nvme,serial=swap,drive=swap", "-append", append),
        ]

    def _ended(self, status: Status, sentence: str) -> Result:
        return Result(status, sentence, self.folder)


class _Watch:
    """A running QEMU, its console and the guest's messages on the control port."""

    def __init__(self, guest: Guest, command: list[str]) -> None:
        self._guest = guest
        self._command = command
        self._control = guest.folder / "control"
        self._console = guest.folder / "console.log"
        self._notes: dict[str, str] = {}

    def result(self) -> Result:
        """Wait for the end, unpack the files, and return the result."""
        started = time.monotonic()
        with (
            self._console.open("wb", buffering=0) as console,
            subprocess.Popen(
                self._command,
                cwd=self._guest.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                up_at, late = self._follow(process, console, started)
            finally:
                process.kill()
        result = self._judge(late)
        result.notes = self._notes
        result.boot_s = up_at - started
        result.wall_s = time.monotonic() - started
        return result

    def _follow(
        self, process: subprocess.Popen[bytes], console: BinaryIO, started: float
    ) -> tuple[float, str]:
        """Copy the console until QEMU ends; return when user space was up, and what timed out."""
        guest = self._guest
        clock = _clock.clock(process.pid, counted=guest.is_counted)
        up_at = up_on = ended_on = said_on = 0.0
        late = ""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            raw = b" "
            while raw:
                now = clock()
                if selector.select(timeout=_POLL_S):
                    raw = os.read(process.stdout.fileno(), 1 << 16)
                    data = _CONSOLE_NOISE.sub(b"", raw)
                    console.write(data)
                    guest.show(data)
                    said_on = now
                self._notes = self._said()
                if not up_at and "up" in self._notes:
                    up_at, up_on = time.monotonic(), now
                if not ended_on and self._notes.keys() & {"status", "no-userfaultfd"}:
                    ended_on = now
                if ended_on:
                    deadline, word = ended_on + END_S * guest.scale, ""
                elif up_at:
                    deadline, word = up_on + guest.run_s * guest.scale, "run"
                else:
                    deadline, word = guest.boot_s * guest.scale, "boot"
                if word == "run" and now > max(said_on, up_on) + guest.quiet_s * guest.scale:
                    deadline, word = 0.0, "quiet"
                is_over = time.monotonic() > guest.until or guest.stop.is_set()
                if now > deadline or is_over:
                    late = word
                    process.kill()
        return up_at or started, late

    def _said(self) -> dict[str, str]:
        try:
            lines = self._control.read_text(errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return {}
        return dict(line.strip().partition(" ")[::2] for line in lines)

    def _judge(self, late: str) -> Result:
        guest = self._guest
        ended = guest._ended
        if "status" in self._notes and self._take_files():
            return Result(int(self._notes["status"]), "", guest.folder)
        if "no-userfaultfd" in self._notes:
            return ended(
                Status.NO_USERFAULTFD,
                f"{guest.kernel} is built without CONFIG_USERFAULTFD",
            )
        if "incomplete" in self._notes or ("up" not in self._notes and self._not_unpacked()):
            return ended(
                Status.NOT_UNPACKED,
                f"the initramfs did not unpack: {guest.memory_mib} MiB of memory may be too "
                "little, or the kernel has no CONFIG_BLK_DEV_INITRD",
            )
        if "no-python" in self._notes and "up" not in self._notes:
            return ended(
                Status.NO_BOOT,
                f"the kernel cannot run Python (status {self._notes['no-python']}); see "
                f"{self._console}",
            )
        if late == "run":
            return ended(
                Status.HANG,
                f"the run did not end within {guest.run_s * guest.scale:.0f} s; its progress is "
                f"in {self._console}",
            )
        if late == "quiet":
            return ended(Status.HANG, "the guest stopped printing anything")
        if "up" in self._notes:
            return ended(
                Status.DIED, f"the guest died during the run; its last output is in {self._console}"
            )
        waited = f" within {guest.boot_s * guest.scale:.0f} s" if late else ""
        last = self._said_on_console().strip().rpartition("\n")[2] or "nothing"
        return ended(
            Status.NO_BOOT,
            f"{guest.kernel} did not boot to user space{waited}; {self._console} ends: {last}",
        )

    def _not_unpacked(self) -> bool:
        console = self._said_on_console()
        return any(line in console for line in _NOT_UNPACKED)

    def _said_on_console(self) -> str:
        return self._console.read_text(errors="replace")

    def _take_files(self) -> bool:
        archive = self._guest.folder / "archive"
        try:
            with tarfile.open(archive, "r:gz") as files:
                for member in files:
                    file = files.extractfile(member) if member.isfile() else None
                    if file is not None:
                        (self._guest.folder / Path(member.name).name).write_bytes(file.read())
        except (tarfile.TarError, EOFError, OSError):
            return False
        archive.unlink()
        self._control.unlink()
        return True


def redirect(arguments: list[str]) -> tuple[list[str], dict[str, Path]]:
    """Let the guest write its reports to the folder that is sent to the host.

    Returns:
        pytest's arguments for the guest, and the paths where the user wants the files, by their
        names in the folder of the run.
    """
    wanted: dict[str, Path] = {}
    guest: list[str] = []
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option not in ("--junitxml", "--junit-xml", "--uffd-report"):
            guest.append(option + equals + value)
            continue
        path = Path(value if equals or not rest else rest.pop(0))
        if option == "--uffd-report":
            # It writes both files, whichever is named.
            stem = path.with_suffix("") if path.suffix in (".json", ".html") else path
            for suffix in (".json", ".html"):
                wanted[f"report{suffix}"] = stem.with_name(stem.name + suffix)
        else:
            wanted["junit.xml"] = path
    guest += [f"--junitxml={GUEST_OUT}/junit.xml", f"--uffd-report={GUEST_OUT}/report.json"]
    return guest, wanted


def accel(cpus: int) -> str:
    """Return QEMU's -accel for this many CPUs, unless the user chose one."""
    return os.environ.get(ACCEL) or (MULTI if cpus > 1 else SINGLE)


def lacking() -> str:
    """Return what this machine lacks to boot any guest, or ""."""
    if shutil.which(QEMU) is None:
        return f"there is no {QEMU} here (apt-get install qemu-system-x86)"
    if shutil.which("busybox") is None:
        return "there is no busybox here (apt-get install busybox-static)"
    return ""


def scale(how: str) -> float:
    """Return the factor on every time limit for a value of QEMU's -accel."""
    usual = EMULATION_SCALE if how.startswith("tcg") else VIRTUAL_SCALE
    return float(os.environ.get("PYUFFD_BUDGET_SCALE", usual))


def end_with_us() -> None:
    """Make SIGTERM end the guests too, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
