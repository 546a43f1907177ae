"""`pyuffd.testing`: its reports are true, and it leaves nothing behind."""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyuffd import (
    BufferSource,
    Feature,
    Fork,
    Ioctl,
    Pagefault,
    PagefaultFlag,
    PageSource,
    PartialResolveError,
    Region,
    RegisterMode,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
    WriteprotectMode,
    ZeroSource,
)
from pyuffd.sources import Promised
from pyuffd.testing import (
    DelayedSource,
    FailingSource,
    FaultingChild,
    FaultingChildError,
    ForkResult,
    GatedSource,
    LeakError,
    WrongLengthSource,
    _leaks,
    child_pids,
    kill,
    layout_change_pending,
    layout_is_changing,
    needs,
    needs_privilege,
    no_leaks,
)
from pyuffd.testing import needs as kit_needs
from pyuffd.testing import needs_privilege as privilege
from pyuffd.testing._needs import needs_kernel_faults
from tests._child import ROOT, limit_s, run_child
from tests._memory import memory_of, memory_params
from tests._tasks import of_threads
from tests.kernel._faults import Task, fork, registered
from tests.kernel._serving import wait_for_stalled, wait_until

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE = 4096
SHORT_S = 0.05
MISSING_WP = RegisterMode.MISSING | RegisterMode.WP

pytestmark = needs(Feature(0))


def resolve(child: FaultingChild, content: bytes = b"x") -> int:
    """Resolve the child's next fault; return its offset in the region."""
    event = child.next_event()
    assert isinstance(event, Pagefault)
    start = event.address - event.address % child.region.page_size
    child.uffd.fill_copy(start, content.ljust(child.region.page_size, b"."))
    return start - child.region.start


# The faulting child


@pytest.mark.parametrize("name", memory_params())
def test_child_faults_on_every_memory_type(
    faulting_child: Callable[..., FaultingChild], name: str
) -> None:
    child = faulting_child(2, memory=name)
    size = memory_of(name).page_size
    assert (child.region.length, child.region.page_size) == (2 * size, size)
    assert (child.region.fd is None) == (name == "anon")
    step = child.begin("read", size, 3)
    assert resolve(child, b"abc") == size
    assert step.done() == b"abc"
    assert child.begin("write", 0, b"hello").running
    assert resolve(child) == 0
    assert child.done() is None
    assert child.run("read", 0, 6) == b"hello."


def test_child_step_goes_on_when_its_fault_is_resolved() -> None:
    with FaultingChild(1) as child:
        step = child.begin("read", 0, 1)
        with pytest.raises(TimeoutError):
            step.done(SHORT_S)
        assert step.running
        resolve(child, b"r")
        assert step.done() == b"r"
        assert not step.running
        assert step.done() == b"r"


def test_child_threads_wait_apart_and_steps_of_one_in_order() -> None:
    with FaultingChild(3) as child:
        first = child.begin("read", 0, 1)
        assert isinstance(child.next_event(), Pagefault)
        behind = child.begin("read", PAGE, 1)
        beside = child.begin("read", 2 * PAGE, 1, thread=1)
        assert resolve(child, b"c") == 2 * PAGE
        assert beside.done() == b"c"
        assert first.running
        assert behind.running
        child.uffd.fill_copy(child.region.start, b"a" * PAGE)
        assert first.done() == b"a"
        assert resolve(child, b"b") == PAGE
        assert behind.done() == b"b"


def test_child_touches_each_page_once() -> None:
    with FaultingChild(3) as child:
        step = child.begin("touch", PAGE, 2 * PAGE, write=True)
        for offset in (PAGE, 2 * PAGE):
            event = child.next_event()
            assert isinstance(event, Pagefault)
            assert (event.address, event.flags) == (
                child.region.start + offset,
                PagefaultFlag.WRITE,
            )
            child.uffd.fill_zero(event.address, PAGE)
        assert step.done() is None
        assert child.uffd.read_events() == []


@needs(Feature.PAGEFAULT_FLAG_WP)
def test_child_content_is_there_before_it_registers() -> None:
    with FaultingChild(
        2, mode=MISSING_WP, features=Feature.PAGEFAULT_FLAG_WP, content=b"there"
    ) as child:
        assert child.run("read", 0, 5) == b"there"
        child.uffd.writeprotect(child.region.start, PAGE)
        step = child.begin("write", 0, b"T")
        event = child.next_event()
        assert isinstance(event, Pagefault)
        assert event.flags & PagefaultFlag.WP
        child.uffd.writeprotect(child.region.start, PAGE, mode=WriteprotectMode(0))
        step.done()
        assert child.run("read", 0, 5) == b"There"


def test_child_that_does_not_register() -> None:
    with FaultingChild(1, mode=None) as child:
        assert child.run("read", 0, 1) == b"\0"
        child.uffd.unregister(child.region)


@needs(Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP)
def test_child_changes_its_layout() -> None:
    features = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP
    with FaultingChild(4, features=features, content=bytes(4 * PAGE)) as child:
        start = child.region.start
        step = child.begin("madvise", mmap.MADV_DONTNEED, 0, PAGE)
        wait_until(lambda: layout_is_changing(child.uffd), "the Remove event is queued")
        assert step.running
        assert child.next_event() == Remove(start, start + PAGE)
        step.done()

        step = child.begin("mremap", PAGE, PAGE)
        event = child.next_event()
        assert isinstance(event, Remap)
        while step.running:  # Linux sends an Unmap of the old place too
            child.uffd.read_events()
        assert step.done() == event.to
        assert (event.from_, event.length) == (start + PAGE, PAGE)
        assert child.run("read", 0, 1, base=event.to) == b"\0"

        step = child.begin("munmap", 3 * PAGE, PAGE)
        assert child.next_event() == Unmap(start + 3 * PAGE, start + 4 * PAGE)
        step.done()


@privilege("CAP_SYS_PTRACE")
@needs(Feature.EVENT_FORK)
def test_child_forks() -> None:
    with FaultingChild(2, features=Feature.EVENT_FORK) as child:
        step = child.begin("fork", "read", PAGE, 2)
        event = child.next_event()
        assert isinstance(event, Fork)
        with event.uffd:
            wait_until(lambda: bool(child_pids_of(child.pid)), "the fork is there")
            result = event.uffd.fill_copy(child.region.start + PAGE, b"fk" + bytes(PAGE - 2))
            assert result.done == PAGE
            forked = step.done()
        assert isinstance(forked, ForkResult)
        assert (forked.returncode, forked.value) == (0, b"fk")
        step = child.begin("fork", "exit", 3)
        event = child.next_event()
        assert isinstance(event, Fork)
        event.uffd.close()
        assert step.done().returncode == 3


def child_pids_of(pid: int) -> list[str]:
    return [word for children in of_threads(pid, "children").values() for word in children.split()]


@needs(Feature.POISON)
def test_child_killed_by_poison_says_so() -> None:
    with FaultingChild(2, features=Feature.POISON) as child:
        child.uffd.fill_poison(child.region)
        # A fork has the poison too, and gets the signal instead.
        assert child.run("fork", "read", 0, 1).returncode == -signal.SIGBUS
        with pytest.raises(FaultingChildError) as caught:
            child.run("read", 0, 1)
        assert caught.value.returncode == -signal.SIGBUS
        with pytest.raises(FaultingChildError):
            child.run("read", 0, 1)
        assert child.wait() == -signal.SIGBUS


def test_child_exits_when_told() -> None:
    with FaultingChild(1) as child:
        waiting = child.begin("read", 0, 1)
        child.next_event()
        assert child.run("exit", 7, thread=1) == 7
        with pytest.raises(FaultingChildError) as caught:
            waiting.done()
        assert caught.value.returncode == 7


def test_child_killed_while_it_waits() -> None:
    with FaultingChild(1) as child:
        step = child.begin("read", 0, 1)
        child.next_event()
        assert child.kill() == -signal.SIGKILL
        with pytest.raises(FaultingChildError) as caught:
            step.done()
        assert caught.value.returncode == -signal.SIGKILL


def test_child_reports_an_errno_and_lives() -> None:
    with FaultingChild(1) as child:
        with pytest.raises(FaultingChildError) as caught:
            child.run("madvise", 0x7FFF, 0, PAGE)
        assert (caught.value.errno, caught.value.returncode) == (errno.EINVAL, None)
        child.run("munmap", 0, PAGE)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.errno, str(again)) == (errno.EINVAL, str(caught.value))


def test_child_that_cannot_start() -> None:
    with no_leaks(), pytest.raises(FaultingChildError) as caught:
        FaultingChild(1, features=Feature(1 << 62))
    assert caught.value.errno == errno.EINVAL
    with no_leaks(), pytest.raises(FaultingChildError) as caught:
        FaultingChild(1, env={"PYTHONHOME": "/nowhere"})
    assert caught.value.returncode == 1


@pytest.mark.parametrize("bad", [{"pages": 0}, {"memory": "tape"}])
def test_child_bad_arguments(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        FaultingChild(**bad)  # type: ignore[arg-type]


def test_child_bad_command() -> None:
    with FaultingChild(1) as child:
        with pytest.raises(ValueError):
            child.begin("format")  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            child.done()
        with pytest.raises(TimeoutError):
            child.next_event(SHORT_S)


def test_child_is_gone_after_close_whatever_it_does() -> None:
    with no_leaks():
        child = FaultingChild(2)
        child.begin("read", 0, 1)
        child.next_event()
        child.begin("fork", "read", PAGE, 1, thread=1)
        child.close()
        child.close()
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


def test_child_ends_with_its_test() -> None:
    """A test that is killed leaves no stalled child."""
    pid = run_child(leave_a_child, expect=-signal.SIGKILL).stdout
    wait_until(lambda: not Path(f"/proc/{int(pid)}").exists(), "the child is gone")


def leave_a_child() -> None:
    child = FaultingChild(1)
    child.begin("read", 0, 1)
    child.next_event()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


# Leaks


def leak_fd() -> Callable[[], None]:
    fd = os.eventfd(0)
    return lambda: os.close(fd)


def leak_memory() -> Callable[[], None]:
    region = Region.memfd(PAGE)
    fd = os.dup(region.fd or 0)
    region.close()
    mapping = Region.file(fd)
    os.close(fd)
    return mapping.close


def leak_registration() -> Callable[[], None]:
    region, uffd = Region.anonymous(PAGE), Userfaultfd()
    uffd.register(region)

    def undo() -> None:
        uffd.close()
        region.close()

    return undo


def leak_thread() -> Callable[[], None]:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()

    def undo() -> None:
        stop.set()
        thread.join()

    return undo


def leak_process() -> Callable[[], None]:
    pid = fork()
    if pid == 0:
        signal.pause()

    def undo() -> None:
        kill(pid)
        os.waitpid(pid, 0)

    return undo


def leak_zombie() -> Callable[[], None]:
    pid = fork()
    if pid == 0:
        os._exit(0)
    return lambda: (os.waitpid(pid, 0), None)[1]


LEAKS: dict[str, tuple[Callable[[], Callable[[], None]], str, str]] = {
    "fd": (leak_fd, "fd", "fds"),
    "memory": (leak_memory, "mapping", "mappings"),
    "registration": (leak_registration, "registered", "mappings"),
    "thread": (leak_thread, "thread", "threads"),
    "process": (leak_process, "process", "processes"),
    "zombie": (leak_zombie, "process", "processes"),
}
KINDS = ["fds", "mappings", "threads", "processes"]


@pytest.mark.parametrize("name", LEAKS)
def test_leak_is_found(name: str) -> None:
    leak, word, kind = LEAKS[name]
    with pytest.raises(LeakError) as caught, no_leaks(settle_s=SHORT_S):
        undo = leak()
    undo()
    assert any(word in text for text in caught.value.leaks), caught.value.leaks
    assert pickle.loads(pickle.dumps(caught.value)).leaks == caught.value.leaks
    with pytest.raises(LeakError), no_leaks(settle_s=SHORT_S, **only(kind)):
        undo = leak()
    undo()


def only(kind: str) -> dict[str, bool]:
    return {each: each == kind for each in KINDS}


def test_no_leak_where_all_is_undone() -> None:
    for leak, _, _ in LEAKS.values():
        with no_leaks():
            leak()()


def test_leak_of_another_kind_is_not_looked_at() -> None:
    with no_leaks(threads=True, fds=False, mappings=False, processes=False):
        undo = leak_fd()
    undo()


def test_what_ends_soon_is_no_leak() -> None:
    with no_leaks():
        thread = threading.Thread(target=threading.Event().wait, args=(0.1,))
        thread.start()
        assert thread.is_alive()


def test_what_ended_while_this_thread_was_kept_waiting_is_no_leak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undo: list[Callable[[], None]] = []

    def collect() -> None:
        undo.pop()()
        time.sleep(2 * SHORT_S)

    monkeypatch.setattr(_leaks, "gc", types.SimpleNamespace(collect=collect))
    with no_leaks(settle_s=SHORT_S):
        undo.append(leak_fd())
    assert not undo


def test_a_thread_that_was_passed_over_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_leaks, "_threads_before", set())
    # Each time it lists them twice before the body and once after it.
    listed: list[list[str]] = [["thread 1 (old)"], [], [], [], [], ["thread 1 (old)"]]
    monkeypatch.setattr(_leaks, "_threads", lambda: iter(listed.pop(0)))
    for _ in range(2):
        with no_leaks(settle_s=0, **only("threads")):
            pass
    assert not listed


def test_an_exception_of_the_body_goes_on() -> None:
    undo: list[Callable[[], None]] = []
    with pytest.raises(LookupError), no_leaks():
        undo.append(leak_fd())
        raise LookupError
    undo[0]()


# Injected faults

CONTENT = bytes(range(256)) * 64


def content_of(answer: Buffer | Promised) -> bytes:
    assert not isinstance(answer, Promised)
    return bytes(answer)


def source() -> BufferSource:
    return BufferSource(CONTENT)


def test_sources_are_page_sources() -> None:
    for wrapped in (
        DelayedSource(source(), 0),
        FailingSource(source(), OSError(errno.EIO, "disk"), times=0),
        WrongLengthSource(source(), 0),
        GatedSource(source(), at=[1 << 40]),
    ):
        assert isinstance(wrapped, PageSource)
        assert wrapped.length == len(CONTENT)
        assert content_of(wrapped.read(300, 500)) == CONTENT[300:800]


def test_sources_that_can_be_sent_pickle() -> None:
    for wrapped in (
        DelayedSource(ZeroSource(), 0.0, at=[PAGE]),
        FailingSource(ZeroSource(), OSError(errno.EIO, "disk")),
        WrongLengthSource(ZeroSource(), 1),
    ):
        assert pickle.loads(pickle.dumps(wrapped)).at == wrapped.at
    with pytest.raises(TypeError):
        pickle.dumps(GatedSource(ZeroSource()))


def test_delayed_source_is_late_where_it_was_told() -> None:
    delayed = DelayedSource(source(), 0.2, at=[PAGE])
    began = time.monotonic()
    delayed.read(PAGE - 8, 16)
    assert time.monotonic() - began >= 0.2
    with pytest.raises(ValueError):
        DelayedSource(source(), -1)


def test_failing_source_fails_where_and_as_often_as_told() -> None:
    error = OSError(errno.EIO, "disk")
    failing = FailingSource(source(), error, at=[PAGE, 3 * PAGE], times=2)
    failing.read(0, PAGE)
    for offset in (PAGE, 3 * PAGE):
        with pytest.raises(OSError) as caught:
            failing.read(offset, PAGE)
        assert caught.value is error
    assert content_of(failing.read(PAGE, 16)) == CONTENT[PAGE : PAGE + 16]


@pytest.mark.parametrize("extra", [-PAGE - 1, -PAGE, -1, 1, PAGE])
def test_wrong_length_source(extra: int) -> None:
    wrong = WrongLengthSource(source(), extra, at=[PAGE])
    data = content_of(wrong.read(PAGE, PAGE))
    assert len(data) == max(0, PAGE + extra)
    assert data.startswith(CONTENT[PAGE : PAGE + min(PAGE, len(data))])
    assert len(content_of(wrong.read(0, PAGE))) == PAGE


def test_gated_source_holds_reads_until_it_opens() -> None:
    gated = GatedSource(source())
    with pytest.raises(TimeoutError):
        gated.wait_for_reads(1, timeout_s=SHORT_S)
    tasks = [Task(gated.read, offset, 4) for offset in (0, PAGE)]
    assert sorted(gated.wait_for_reads(2)) == [0, PAGE]
    assert all(task.running for task in tasks)
    gated.open()
    assert [content_of(task.result()) for task in tasks] == [b"\0\1\2\3"] * 2
    gated.read(0, 4)


# A layout change held open


@needs(Feature.EVENT_REMOVE)
@pytest.mark.parametrize("name", memory_params())
def test_everything_gets_eagain_while_a_change_is_pending(name: str) -> None:
    run_child(eagain_while_pending, name)


def eagain_while_pending(name: str) -> None:
    features = Feature.EVENT_REMOVE
    with memory_of(name).pages(3) as region, registered(region, features=features) as uffd:
        size = region.page_size
        assert not layout_is_changing(uffd)
        with layout_change_pending(uffd, region, offset=size) as change:
            assert layout_is_changing(uffd)
            with pytest.raises(PartialResolveError):
                uffd.copy(region.start, bytes(size))
            assert uffd.fill_copy(region, bytes(3 * size), retry_s=0).deferred == 3 * size
            assert change.release() == [Remove(region.start + size, region.start + 2 * size)]
            assert change.release() == []
            assert not layout_is_changing(uffd)
        assert uffd.copy(region.start, bytes(size)) == size


@needs(Feature.EVENT_REMOVE)
def test_faults_read_at_the_end_of_a_change_are_kept() -> None:
    run_child(faults_are_kept)


def faults_are_kept() -> None:
    features = Feature.EVENT_REMOVE
    with Region.anonymous(2 * PAGE) as region, registered(region, features=features) as uffd:
        with layout_change_pending(uffd, region, offset=PAGE):
            task = Task(region.read, 0, 1)
            wait_for_stalled(uffd, 1)
        (event,) = uffd.read_events()
        assert isinstance(event, Pagefault)
        uffd.fill_zero(event.address, PAGE)
        assert task.result() == b"\0"


def test_change_that_nobody_waits_for() -> None:
    with (
        Userfaultfd() as uffd,
        Region.anonymous(PAGE) as region,
        pytest.raises(ValueError),
        layout_change_pending(uffd, region),
    ):
        pass


@needs(Feature.EVENT_REMOVE)
def test_change_of_memory_that_is_not_registered() -> None:
    with Userfaultfd(features=Feature.EVENT_REMOVE) as uffd, Region.anonymous(PAGE) as region:
        with pytest.raises(TimeoutError), layout_change_pending(uffd, region):
            pass
        with pytest.raises(ValueError), layout_change_pending(uffd, region, length=3):
            pass


# Processes killed


def test_kill_returns_when_it_is_dead() -> None:
    before = child_pids()
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        assert child_pids() - before == {process.pid}
        with pytest.raises(TimeoutError):
            kill(process, number=signal.SIGCONT, timeout_s=SHORT_S)
        kill(process.pid)
        assert process.poll() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        kill(process.pid)


# The plugin


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run a test file that uses only the package, and nothing else of this repository."""

    def run(text: str, *args: str, **env: str) -> tuple[int, str]:
        (tmp_path / "test_theirs.py").write_text(textwrap.dedent(text))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PY")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *args, "."],
            cwd=tmp_path,
            env={**clean, "PYTHONDONTWRITEBYTECODE": "1", **env},
            capture_output=True,
            text=True,
            timeout=limit_s(60),
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_plugin_does_not_load_the_package(suite: Callable[..., tuple[int, str]]) -> None:
    text = """
        import sys

        def test_not_loaded():
            assert "_pyuffd_pytestplugin" in sys.modules
            assert [name for name in sys.modules if name.split(".")[0] == "pyuffd"] == []
    """
    status, output = suite(text, "--strict-markers")
    assert status == 0, output


NEEDS = """
    import pytest
    from pyuffd import Feature, Ioctl
    from pyuffd.testing import needs, needs_hugepages, needs_ioctl, needs_swap, require

    LACKING = needs(Feature(1 << 62))

    @pytest.fixture
    def expensive():
        raise AssertionError("made before the needs were checked")

    @LACKING
    def test_marked(expensive): ...

    @pytest.mark.parametrize("n", [1, pytest.param(2, marks=needs_hugepages(1 << 40))])
    def test_parametrised(n): ...

    def test_in_the_middle():
        require(LACKING)
        raise AssertionError("went on")

    @needs(Feature(0))
    @needs_ioctl(Ioctl.COPY)
    def test_met(): ...
"""


@needs_kernel_faults()
def test_plugin_skips_with_what_was_found(suite: Callable[..., tuple[int, str]]) -> None:
    status, output = suite(NEEDS, "--strict-markers", "-W", "error")
    assert status == 0, output
    assert "2 passed, 3 skipped" in output
    assert "0x4000000000000000" in output
    assert "the kernel offers 0x" in output


@needs_kernel_faults()
def test_plugin_fails_instead_if_told(suite: Callable[..., tuple[int, str]]) -> None:
    status, output = suite(NEEDS, PYUFFD_TESTS="require")
    assert status == 1, output
    assert "1 failed, 2 passed, 2 errors" in output
    status, output = suite(
        NEEDS,
        PYUFFD_TESTS="require",
        PYUFFD_TESTS_MAY_LACK="0x4000000000000000 hugepages-2048kB",
    )
    assert status == 0, output


def test_skips_of_others_stay_skips(suite: Callable[..., tuple[int, str]]) -> None:
    text = """
        import pytest

        def test_tired(): pytest.skip("tired")
    """
    status, output = suite(text, PYUFFD_TESTS="require")
    assert status == 0, output
    assert "1 skipped" in output


def test_a_mode_that_nobody_knows_is_refused(suite: Callable[..., tuple[int, str]]) -> None:
    status, output = suite("def test(): ...", PYUFFD_TESTS="perhaps")
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "PYUFFD_TESTS='perhaps'" in output


@needs_kernel_faults()
def test_plugin_fixtures(suite: Callable[..., tuple[int, str]]) -> None:
    text = """
        import os
        from pyuffd import Userfaultfd
        import pytest

        def test_child(pyuffd_no_leaks, faulting_child):
            one, two = faulting_child(1), faulting_child(pages=2, memory="shmem")
            step = one.begin("read", 0, 1)
            one.uffd.fill_copy(one.next_event().address, b"y" * 4096)
            assert step.done() == b"y"

        def test_leaky(pyuffd_no_leaks):
            os.eventfd(0)
    """
    status, output = suite(text, "-W", "error")
    assert status == 1, output
    assert "2 passed, 1 error" in output
    assert "anon_inode:[eventfd]" in output


def test_kit_works_without_pytest() -> None:
    run_child(
        "import sys\n"
        "sys.modules['pytest'] = None\n"
        "from pyuffd.testing import FaultingChild, no_leaks\n"
        "with no_leaks(), FaultingChild(1) as child:\n"
        "    step = child.begin('read', 0, 1)\n"
        "    child.uffd.fill_zero(child.next_event().address, 4096)\n"
        "    assert step.done() == b'\\0'\n"
    )


def test_unknown_capability() -> None:
    with pytest.raises(ValueError):
        needs_privilege("CAP_FLY")
    assert kit_needs(Ioctl.COPY).name == "pyuffd_need"


# The document; test_readme.py runs its programs


def shown_files() -> Iterator[object]:
    """Yield the test files that the document shows."""
    text = (ROOT / "docs" / "testing.md").read_text()
    for number, block in enumerate(text.split("```py\n")[1:]):
        yield pytest.param(block.partition("```")[0], id=str(number))


@needs_kernel_faults()
@pytest.mark.parametrize("text", list(shown_files()))
def test_document(text: str, suite: Callable[..., tuple[int, str]]) -> None:
    status, output = suite(text, "-W", "error")
    assert status == 0, output
    assert "passed" in output
