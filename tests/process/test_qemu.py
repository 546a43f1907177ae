"""Guests of an unmodified QEMU, without KVM: tracked, saved while they run, and restored lazily.

The guest itself finds pages that are not as it left them, and tells its number, which it makes up
when it boots: see examples/qemu/guest.s.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from examples.qemu._guest import PROGRAM, Guest
from pyuffd import BlindReason, DirtyTracker, Process, RunState, Snapshot
from pyuffd.remote import Mapping
from pyuffd.snapshot import _capture
from pyuffd.snapshot._capture import Used
from pyuffd.testing import needs_hugepages
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from pyuffd.testing._run import SCALE
from tests._child import limit_s
from tests._memory import PAGE
from tests.process._attach import status, wait_until
from tests.process._tracking import METHODS, OF_OTHERS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "qemu"
HUGE_PAGES = 16  # all of a guest's memory
FIRST, GROUPS = 2 << 20, 16  # as in guest.s
BEHIND = 128 << 10  # the firmware's tables, behind the memory that it tells the guest of


def needs_qemu() -> pytest.MarkDecorator:
    """Skip where QEMU, or what makes the guest's program, is not installed."""

    def missing() -> tuple[list[str], str]:
        lack = [name for name in (PROGRAM, "as", "ld") if shutil.which(name) is None]
        return lack, f"not installed: {', '.join(lack)}"

    return marked(Need("QEMU and binutils", missing))


pytestmark = [
    *OF_OTHERS,
    needs_qemu(),
]


def check_pages(memory: bytes, nonce: str) -> int:
    """Check that all of a guest's memory is of one instant; return the round that it was in."""
    number = int(nonce, 16).to_bytes(8, "little")
    rounds = []
    for address in range(FIRST, len(memory) - BEHIND, PAGE):
        page = memory[address : address + 16]
        assert page[:8] == number, hex(address)
        assert int.from_bytes(page[8:12], "little") == address
        rounds.append(int.from_bytes(page[12:], "little"))
    # Each page was written in the last round that was its turn.
    last = max(rounds)
    turns = [(last - page) % GROUPS for page in range(len(rounds))]
    behind = [last - of for of in rounds]
    # In the middle of a round those at the end have their turn still before them.
    late = [page for page, (turn, is_) in enumerate(zip(turns, behind, strict=True)) if turn != is_]
    assert all(turns[page] == 0 and behind[page] == GROUPS for page in late)
    done = [page for page in range(len(rounds)) if turns[page] == 0 and page not in late]
    assert not late or done[-1] < late[0]
    return last


def wait_for_rounds(guest: Guest, more: int) -> None:
    rounds = guest.wait(more)
    assert len({each.nonce for each in rounds}) == 1
    assert [each.number for each in rounds] == list(range(GROUPS, GROUPS + len(rounds)))


@pytest.mark.stress
def test_a_guest_notices_wrong_memory(tmp_path: Path) -> None:
    """One byte is enough; and a guest that begins anew has another number."""
    with Guest(tmp_path, "first") as guest, Process(guest.pid) as qemu:
        nonce = guest.wait(1)[-1].nonce
        guest.save_state(tmp_path / "state")
        ram = guest.ram(qemu)
        with open(f"/proc/{guest.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(ram.start + FIRST + 100 * PAGE)
            memory.write(b"!")
        guest.cont()
        with pytest.raises(RuntimeError, match=f"the guest says: bad {FIRST + 100 * PAGE:08x}"):
            guest.wait(1000)
    ends = pytest.raises(RuntimeError, match="QEMU has ended, with status 1")
    with Guest(tmp_path, "second", waits=True) as guest, ends:
        guest.load_state(tmp_path / "state")  # into empty memory: QEMU misses firmware's code
    with Guest(tmp_path, "third") as guest:
        assert guest.wait(1)[0].number == GROUPS
        assert guest.rounds()[0].nonce != nonce


HUGE = [pytest.mark.stress, needs_hugepages(HUGE_PAGES)]
# -sandbox: a seccomp filter that forbids userfaultfd(2), among others.
TRACKED = [
    pytest.param("memfd", "wp-async"),
    pytest.param("memfd sandbox", "wp-async", marks=pytest.mark.stress),
    pytest.param("anonymous", "wp-async", marks=pytest.mark.stress),
    pytest.param("file", "wp-async", marks=pytest.mark.stress),
    pytest.param("hugetlb", "wp-async", marks=HUGE),
    pytest.param("memfd", "wp-sync", marks=pytest.mark.stress),
    pytest.param("anonymous", "wp-sync", marks=pytest.mark.stress),
    pytest.param("hugetlb", "wp-sync", marks=HUGE),
]


@pytest.mark.parametrize(("backend", "method"), TRACKED)
def test_an_image_kept_up_to_date(
    backend: str, method: Literal["wp-async", "wp-sync"], tmp_path: Path
) -> None:
    """What the rounds report, copied while the guest runs on, makes up its memory at the end."""
    backend, _, more = backend.partition(" ")
    options = ("-sandbox", "on") if more else ()
    with (
        Guest(tmp_path, "guest", backend, options=options) as guest,
        Process(guest.pid) as qemu,
    ):
        assert (status(guest.pid)["Seccomp"] != "0") == bool(more)
        guest.wait(1)
        ram = guest.ram(qemu)
        image = bytearray(ram.length)
        before = sorted(os.listdir(f"/proc/{guest.pid}/fd"))
        with DirtyTracker(qemu, [ram], method=method) as tracker:
            reasons = {blind.reason for blind in tracker.blind}
            assert (BlindReason.SHARED in reasons) == (backend != "anonymous")
            qemu.copy(ram, image)
            written = []
            for _ in range(6):
                guest.wait(2)
                written.append(keep(qemu, tracker, ram, image))
            guest.stop()
            written.append(keep(qemu, tracker, ram, image))
            assert image == qemu.read(ram.start, ram.length)
            with tracker.collect() as round_:
                assert (round_.written.bytes, round_.dropped.bytes) == (0, 0)
            # A round writes a sixteenth of the pages, some of them in each huge page.
            share = 1 if backend == "hugetlb" else GROUPS
            assert min(written[:-1]) >= (ram.length - 2 * FIRST) // share
            check_pages(bytes(image), guest.rounds()[-1].nonce)
            guest.cont()
        wait_for_rounds(guest, GROUPS)
        assert sorted(os.listdir(f"/proc/{guest.pid}/fd")) == before
        assert status(guest.pid)["TracerPid"] == "0"


def keep(qemu: Process, tracker: DirtyTracker, ram: Mapping, image: bytearray) -> int:
    """Bring an image up to date with one round; return how much that was."""
    with tracker.collect() as round_:
        assert not round_.layout
        for item in round_.dropped:
            at = item.start - ram.start
            image[at : at + item.length] = bytes(item.length)
        for pages in (round_.written, round_.unsure):
            assert not len(qemu.copy(pages, image, base=ram.start).lost)
        round_.commit()
    return round_.written.bytes


SAVED = [
    pytest.param(
        backend,
        method,
        marks=[
            *([] if (backend, method) == ("anonymous", "cow") else [pytest.mark.stress]),
            *([needs_hugepages(HUGE_PAGES)] if backend == "hugetlb" else []),
        ],
    )
    for backend in ("anonymous", "memfd", "file", "hugetlb")
    for method in METHODS
]


@pytest.mark.parametrize(("backend", "method"), SAVED)
def test_a_snapshot_while_it_runs(
    backend: str, method: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of QEMU is saved; what the guest's memory was in the stop is in the snapshot."""
    with Guest(tmp_path, "guest", backend) as guest, Process(guest.pid) as qemu:
        guest.wait(1)
        ram = guest.ram(qemu)
        references = []

        def copy(name: str) -> None:
            if name == "stopped":
                references.append(qemu.read(ram.start, ram.length))

        monkeypatch.setattr(_capture, "barrier", copy)
        report = Snapshot.take(
            qemu,
            tmp_path / "snapshot",
            method=method,
            shared="refuse" if backend == "anonymous" else "pause",
            max_stall_s=None if method == "stopped" else 2 * SCALE,
            durable=False,
        )
        monkeypatch.undo()
        wait_for_rounds(guest, GROUPS)
        assert report.method == method
        assert not report.dropped
        with Snapshot.open(report.path) as snapshot:
            memory = saved(snapshot, ram)
        assert memory == references[-1]
        assert check_pages(memory, guest.rounds()[-1].nonce) < guest.rounds()[-1].number
        wait_until("registered", lambda: not is_registered(guest.pid))


def saved(snapshot: Snapshot, ram: Mapping) -> bytes:
    """Return the guest's memory. Where a file has holes there is nothing to be read."""
    memory = bytearray(ram.length)
    for run in snapshot.runs:
        if ram.start <= run.start < ram.end and run.state is not RunState.ABSENT:
            assert run.state in (RunState.DATA, RunState.ZERO)
            at = run.start - ram.start
            memory[at : at + run.length] = snapshot.read(run.start, run.length)
    return bytes(memory)


def is_registered(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    flags = {"um", "uw", "ui"}
    return any(flags & set(line.split()) for line in lines if line.startswith("VmFlags"))


@pytest.mark.stress
@pytest.mark.parametrize("backend", ["anonymous", "memfd"])
def test_the_example_that_tracks(backend: str) -> None:
    command = [sys.executable, str(EXAMPLES / "track.py"), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s(60))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("the image is the guest's memory: True\n")
    assert ("cannot be seen: shared" in done.stdout) == (backend == "memfd")


RESTORED = [
    pytest.param("missing"),
    pytest.param("minor", marks=pytest.mark.stress),
    pytest.param("hugetlb", marks=[pytest.mark.stress, needs_hugepages(HUGE_PAGES)]),
]


@pytest.mark.parametrize("mode", RESTORED)
def test_a_guest_goes_on_in_another_qemu(mode: str) -> None:
    """It finds all pages as it had left them, and has its number still."""
    command = [sys.executable, str(EXAMPLES / "restore.py"), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s(60))
    assert (done.returncode, done.stderr) == (0, "")
    first, touched, last = done.stdout.splitlines()
    number = int(first.split()[1].rstrip(":"))
    assert 1 <= int(touched.split()[3]) < (20 if mode == "hugetlb" else 6000)
    assert last.startswith(f"rounds {number + 1} to ")
    assert last.endswith("all pages are right, same nonce")


# Saves a guest, lets it go on with lazy memory, tells the id of QEMU, and waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import restore
from _guest import Guest
from pyuffd import Handler

def tell(handler, ram):
    print(handler.uffd.owner_pid, flush=True)
    time.sleep(1000)

if __name__ == "__main__":
    Handler.load = tell
    folder = Path(sys.argv[2])
    restore.restore(folder, "missing", *restore.save(folder, "memfd"))
"""


@pytest.mark.stress
def test_its_memory_is_never_zeros_if_we_are_killed(tmp_path: Path) -> None:
    """QEMU ends when the guest touches a page that nobody can bring any more."""
    (tmp_path / "program.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "program.py"), str(EXAMPLES), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        program.stdout.readline(), program.stdout.readline()
        pid = int(program.stdout.readline())
        pidfd = os.pidfd_open(pid)
        program.kill()
        program.wait()
    try:
        wait_until("runs", lambda: not Path(f"/proc/{pid}/maps").read_bytes())
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    lines = (tmp_path / "second.log").read_text().splitlines()
    assert 3 <= len(lines) < GROUPS
    assert all(line.startswith("round ") for line in lines)
