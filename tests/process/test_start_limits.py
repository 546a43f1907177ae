"""Each driver under each limit, and with each system call refused: it works or says why."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyuffd import (
    BufferSource,
    CallableSource,
    Feature,
    Handler,
    HandlerError,
    PartialResolveError,
    Region,
    UffdOSError,
    Userfaultfd,
    _machine,
)
from pyuffd.testing import no_leaks
from tests._child import run_child
from tests.process import _process_sources as sources
from tests.process._process_sources import PAGE, content
from tests.process._scripts import run_program
from tests.seccomp_deny import deny_call

DRIVERS = ["native", "inline", "thread", "process"]
PYTHON = ("thread", "process")
LENGTH = 4 * PAGE
WORKERS = 2


def uffd_for(driver: str) -> Userfaultfd:
    return Userfaultfd(features=Feature.SIGBUS if driver == "inline" else Feature(0))


@contextlib.contextmanager
def handler_of(driver: str, uffd: Userfaultfd, region: Region) -> Iterator[Handler]:
    python = driver in PYTHON
    source: Any = CallableSource(sources.page) if python else BufferSource(content(LENGTH))
    workers = WORKERS if python else 1
    with Handler(uffd, driver=driver, workers=workers) as handler:  # type: ignore[arg-type]
        handler.serve(region, source)
        yield handler


def attempt(driver: str) -> str:
    """Use a driver, leaving nothing behind; return its failure, or "" if it works."""
    problem = ""
    with uffd_for(driver) as uffd, Region.anonymous(LENGTH) as region, no_leaks():
        try:
            with handler_of(driver, uffd, region):
                assert region.read() == content(LENGTH)
        except (UffdOSError, HandlerError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    assert not problem.startswith(PartialResolveError.__name__)
    return problem


# Descriptors


def few_descriptors(driver: str) -> list[str]:
    """Allow one more descriptor each time, until it works."""
    found = []
    with uffd_for(driver) as uffd, Region.anonymous(LENGTH) as region:
        attempt("native")  # does its imports
        first = len(os.listdir("/proc/self/fd"))
        for limit in range(first, first + 40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
            before = threading.active_count()
            try:
                with handler_of(driver, uffd, region):
                    assert region.read() == content(LENGTH)
            except (UffdOSError, HandlerError) as error:
                found.append(str(error))
                assert threading.active_count() == before
                continue
            break
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        with no_leaks(), handler_of(driver, uffd, region):
            pass
    return found


@pytest.mark.parametrize("driver", ["native", "thread", "process"])
def test_descriptors(driver: str) -> None:
    problems = run_child(few_descriptors, driver, budget_s=60).value
    assert problems
    for problem in problems:
        assert "RLIMIT_NOFILE" in problem, problem


def hard_limit(driver: str, limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return attempt(driver)


@pytest.mark.crossing
@pytest.mark.parametrize("limit", [20, 64])
@pytest.mark.parametrize("driver", DRIVERS)
def test_descriptors_of_every_process(driver: str, limit: int) -> None:
    result = run_child(hard_limit, driver, limit, budget_s=20)
    assert result.value == ""


def many_regions() -> str:
    """More regions than the helper's descriptors allow: an error, and the others are served."""
    with contextlib.ExitStack() as stack:
        uffd = stack.enter_context(Userfaultfd())
        handler = stack.enter_context(Handler(uffd, driver="process"))
        regions: list[Region] = []
        problem = ""
        while not problem and len(regions) < 100:
            region = stack.enter_context(Region.anonymous(PAGE))
            try:
                handler.serve(region, sources.Source(len(regions)))
                regions.append(region)
            except (HandlerError, UffdOSError) as error:
                problem = str(error)
        for index, region in enumerate(regions):
            assert region.read() == content(PAGE, index)
        assert handler.stats().restarts == 0
    return problem


def many_regions_with_few_descriptors() -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    return many_regions()


def test_a_region_too_many() -> None:
    problem = run_child(many_regions_with_few_descriptors, budget_s=30).value
    assert "RLIMIT_NOFILE" in problem


# Threads and processes

CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24
PR_CAPBSET_DROP = 24
# An unused user id: RLIMIT_NPROC counts all processes of a user.
UID = 64000 + os.getpid() % 1000


def without_privilege_for_limits() -> None:
    """Stay root for files, but become an ordinary user for RLIMIT_NPROC, with all children."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setresuid(UID, 0, 0)
    for capability in (CAP_SYS_ADMIN, CAP_SYS_RESOURCE):
        assert libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0
    header = struct.pack("=Ii", 0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for index in range(3):  # effective, permitted, inheritable
        data[index] &= ~(1 << CAP_SYS_ADMIN | 1 << CAP_SYS_RESOURCE)
    assert libc.capset(header, data) == 0


def few_tasks(driver: str) -> list[str]:
    """Allow one more process or thread each time, until it works."""
    without_privilege_for_limits()
    found = []
    for limit in range(1, 12):
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, 100))
        problem = attempt(driver)
        found.append(problem)
        if not problem:
            break
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("driver", DRIVERS)
def test_threads_and_processes(driver: str) -> None:
    result = run_child(few_tasks, driver, budget_s=60)
    *problems, last = result.value
    assert last == ""
    for problem in problems:
        assert "RLIMIT_NPROC is " in problem, problem
    # The process driver needs a keeper, a worker, a holder, and threads.
    least = {"native": 1, "inline": 0, "thread": 1 + WORKERS, "process": 3 + WORKERS}
    assert len(problems) >= least[driver]


def starts_later(driver: str) -> None:
    """A handler whose start failed can be started when the limit allows it."""
    without_privilege_for_limits()
    with uffd_for(driver) as uffd, Region.anonymous(LENGTH) as region:
        handler = Handler(uffd, driver=driver, workers=WORKERS, autostart=False)  # type: ignore[arg-type]
        handler.serve(region, CallableSource(sources.page))
        used = len(os.listdir("/proc/self/task"))
        resource.setrlimit(resource.RLIMIT_NPROC, (used + 2, 100))
        with pytest.raises(UffdOSError) as caught:
            handler.start()
        assert caught.value.errno == errno.EAGAIN
        assert len(os.listdir("/proc/self/task")) <= used + 1  # one may still be exiting
        resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
        handler.start()
        assert region.read() == content(LENGTH)
        handler.stop()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_a_failed_start_is_undone() -> None:
    run_child(starts_later, "thread")


# Other limits

MIB = 1 << 20


def limited(driver: str, name: str, room: int) -> str:
    number = getattr(resource, f"RLIMIT_{name}")
    attempt(driver)  # all imports are done, and the allocators have their memory
    used = 0
    if name in ("AS", "DATA"):
        from pyuffd._machine import status

        used = status()["VmSize" if name == "AS" else "VmData"]
    before = resource.getrlimit(number)
    resource.setrlimit(number, (used + room, before[1]))
    try:
        return attempt(driver)
    finally:
        resource.setrlimit(number, before)


@pytest.mark.crossing(every=2)
@pytest.mark.parametrize(
    ("driver", "name", "room", "said"),
    [
        *((driver, "MEMLOCK", 0, "") for driver in DRIVERS),
        *((driver, "FSIZE", 0, "") for driver in ("native", "inline", "thread")),
        ("process", "FSIZE", 0, "RLIMIT_FSIZE"),
        ("native", "AS", 2 * MIB, "RLIMIT_AS"),
        ("thread", "AS", 2 * MIB, "RLIMIT_AS"),
        ("native", "DATA", 2 * MIB, "RLIMIT_DATA"),
        ("thread", "DATA", 2 * MIB, "RLIMIT_DATA"),
    ],
)
def test_limits(driver: str, name: str, room: int, said: str) -> None:
    problem = run_child(limited, driver, name, room, budget_s=20).value
    if said:
        assert said in problem, problem
    else:
        assert problem == ""


def little_room(driver: str, name: str, rooms: list[int]) -> list[str]:
    """Start and stop with a little room left, and more each time."""
    attempt(driver)
    found = []
    for room in rooms:
        try:
            found.append(limited_use(driver, name, room))
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def limited_use(driver: str, name: str, room: int) -> str:
    """Use a driver; the userfaultfd and the region are made before."""
    number = getattr(resource, f"RLIMIT_{name}")
    before = resource.getrlimit(number)
    problem = ""
    with uffd_for(driver) as uffd, Region.anonymous(LENGTH) as region:
        used = _machine.status()["VmSize" if name == "AS" else "VmData"]
        resource.setrlimit(number, (used + room, before[1]))
        try:
            with handler_of(driver, uffd, region):
                assert region.read() == content(LENGTH)
        except (UffdOSError, HandlerError, MemoryError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(number, before)
    return problem


@pytest.mark.parametrize("name", ["AS", "DATA"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_little_room(driver: str, name: str) -> None:
    """With room for the stack of a thread and no more, the start or the stop waited forever."""
    rooms = [0, MIB // 16, MIB // 4, *(n * MIB for n in (1, 2, 4, 8, 9, 10, 12, 17, 20, 26))]
    problems = run_child(little_room, driver, name, rooms, budget_s=60).value
    for problem in problems:
        assert problem == "" or f"RLIMIT_{name}" in problem, problems


WITHOUT_IMPORTS = """
import ctypes
import pyuffd

Handler = pyuffd.Handler
used = int(open("/proc/self/statm").read().split()[0]) * 4096
with pyuffd.Userfaultfd() as uffd:
    RLIMIT_AS = 9
    both = (ctypes.c_ulong * 2)(used, used)
    assert ctypes.CDLL(None).setrlimit(RLIMIT_AS, both) == 0
    try:
        Handler(uffd)
    except pyuffd.UffdOSError as error:
        print(error)
"""


def test_no_memory_to_load_modules(tmp_path: Path) -> None:
    """The cause is looked up without loading a module, which would fail as well."""
    ended = run_program(tmp_path, WITHOUT_IMPORTS)
    assert "RLIMIT_AS" in ended.stdout, ended.stderr


LITTLE_ROOM = """
import resource, sys
import pyuffd

Handler, Region, Userfaultfd = pyuffd.Handler, pyuffd.Region, pyuffd.Userfaultfd
Source, UffdOSError = pyuffd.CallableSource, pyuffd.UffdOSError
name, driver, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
field = {"AS": "VmSize:", "DATA": "VmData:"}[name]
with open("/proc/self/status") as lines:
    used = next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
number = getattr(resource, f"RLIMIT_{name}")
resource.setrlimit(number, (used + room, resource.RLIM_INFINITY))
try:
    with Userfaultfd() as uffd, Region.anonymous(8192) as region:
        with Handler(uffd, driver=driver) as handler:
            handler.serve(region, Source(lambda offset, length: b"x" * length))
except UffdOSError as error:
    problem = str(error)
resource.setrlimit(number, (resource.RLIM_INFINITY,) * 2)
print(problem)
"""


@pytest.mark.crossing
@pytest.mark.parametrize("room", range(0, 9 * MIB // 16, MIB // 16))
@pytest.mark.parametrize("name", ["AS", "DATA"])
def test_no_room_for_the_objects_of_a_handler(name: str, room: int, tmp_path: Path) -> None:
    """It was a MemoryError without a word, if it came at an object of Python."""
    ended = run_program(tmp_path, LITTLE_ROOM, arguments=(name, "thread", str(room)))
    assert f"RLIMIT_{name} is" in ended.stdout, ended.stderr


def test_address_space_for_the_process_driver() -> None:
    """Whether 2 MiB suffice for its threads depends on what is mapped already."""
    problem = run_child(limited, "process", "AS", 2 * MIB, budget_s=20).value
    assert problem == "" or "RLIMIT_AS" in problem, problem


# A filter of system calls, like those of containers

CALLS = {
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "memfd_create": 319,
    "sched_setaffinity": 203,
    "epoll_create1": 291,
    "eventfd2": 290,
    "mincore": 27,
    "madvise": 28,
    "timerfd_create": 283,
    "process_vm_readv": 310,
    "prctl": 157,
    "tgkill": 234,
    "socketpair": 53,
    "setsid": 112,
}


def denied(driver: str, call: str, code: int) -> str:
    deny_call(CALLS[call], code)
    return attempt(driver)


REFUSED = {
    "native": {"epoll_create1", "eventfd2", "timerfd_create"},
    "thread": {"epoll_create1", "eventfd2", "timerfd_create"},
    "inline": {"epoll_create1"},
    "process": {
        *("epoll_create1", "eventfd2", "timerfd_create", "pidfd_open", "memfd_create"),
        *("prctl", "socketpair", "setsid"),
    },
}


@pytest.mark.crossing
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_refused_calls(driver: str, call: str) -> None:
    problem = run_child(denied, driver, call, errno.EPERM, budget_s=20).value
    if call not in REFUSED[driver]:
        assert problem == ""
        return
    assert call in problem or call == "setsid", problem
    assert "Operation not permitted" in problem
    assert "seccomp filter" in problem or call == "setsid", problem


def memory_denied() -> str:
    deny_call(CALLS["memfd_create"])
    with pytest.raises(UffdOSError) as caught:
        Region.memfd(LENGTH)
    return str(caught.value)


def test_memory_that_is_refused() -> None:
    problem = run_child(memory_denied).value
    assert "must allow memfd_create" in problem


def test_calls_that_do_not_exist() -> None:
    problem = run_child(denied, "process", "pidfd_open", errno.ENOSYS).value
    assert "pidfd_open: Function not implemented" in problem
