"""Opening, the handshake, closing, and the errors for an unprivileged user."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyuffd import (
    ClosedError,
    Feature,
    Ioctl,
    Region,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
    Userfaultfd,
    lowlevel,
)
from pyuffd.testing import needs, needs_privilege
from pyuffd.testing._need import CAPABILITIES, Need, kernel_features
from pyuffd.testing._needs import marked, needs_kernel_faults, needs_syscall
from tests._child import run_child
from tests.kernel._faults import Task, next_fault, offered, open_files

pytestmark = needs(Feature(0))

PAGE = 4096
USER_MODE_ONLY = 1
NOBODY = 65534
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
DEVICE = Path("/dev/userfaultfd")
PR_SET_DUMPABLE = 4
EVENT_FORK_BIT = 1
CAPABILITY_VERSION_3 = 0x20080522


def needs_device() -> pytest.MarkDecorator:
    return marked(
        Need(
            "a readable /dev/userfaultfd",
            lambda: ([] if os.access(DEVICE, os.R_OK | os.W_OK) else ["device"], "none found"),
        )
    )


def needs_refusal() -> pytest.MarkDecorator:
    """An unprivileged user may not open a userfaultfd for kernel faults."""

    def missing() -> tuple[list[str], str]:
        allowed = SYSCTL.exists() and SYSCTL.read_text().strip() != "0"
        open_to_all = DEVICE.exists() and bool(DEVICE.stat().st_mode & 0o006)
        keys = ["unprivileged_userfaultfd=0"] if allowed else []
        return keys + (["closed-device"] if open_to_all else []), "anyone may open one"

    return marked(Need("userfaultfd refused to unprivileged users", missing))


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # A process that changed its user cannot read its own files in /proc.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def drop_capability(name: str) -> None:
    """Drop one capability of this process permanently, keeping its user."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("<II", CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("<6I", data.raw))
    number = CAPABILITIES[name]
    for column in range(3):
        words[3 * (number // 32) + column] &= ~(1 << number % 32)
    assert libc.capset(header, ctypes.create_string_buffer(struct.pack("<6I", *words))) == 0


# Both ways to open


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(lowlevel.open_syscall, id="syscall", marks=needs_syscall()),
        pytest.param(lowlevel.open_device, id="device", marks=needs_device()),
    ],
)
class TestTwoStepHandshake:
    def test_one_handshake_per_descriptor(self, way: Callable[[int], int]) -> None:
        fd = way(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
            assert not os.get_inheritable(fd)
            assert not os.get_blocking(fd)
            features, ioctls = lowlevel.api(fd, 0)
            assert features == kernel_features()
            assert Ioctl.REGISTER | Ioctl.UNREGISTER | Ioctl.API in Ioctl(ioctls)
            with pytest.raises(UffdOSError) as caught:
                lowlevel.api(fd, 0)
            assert caught.value.errno == errno.EINVAL
        finally:
            os.close(fd)

    def test_a_failed_handshake_may_be_repeated(self, way: Callable[[int], int]) -> None:
        fd = way(os.O_CLOEXEC)
        try:
            with pytest.raises(UffdOSError) as caught:
                lowlevel.api(fd, 1 << 63)
            assert caught.value.errno == errno.EINVAL
            assert lowlevel.api(fd, 0)[0] == kernel_features()
        finally:
            os.close(fd)

    def test_nothing_works_before_the_handshake(self, way: Callable[[int], int]) -> None:
        fd = way(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with Region.anonymous(PAGE) as region, pytest.raises(UffdOSError) as caught:
                lowlevel.register(fd, region.start, region.length, 1)
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(UffdOSError) as caught:
                lowlevel.read(fd, 32)
            assert caught.value.errno == errno.EINVAL
        finally:
            os.close(fd)

    def test_unknown_flag(self, way: Callable[[int], int]) -> None:
        before = open_files()
        with pytest.raises(UffdOSError) as caught:
            way(1 << 30)
        assert caught.value.errno == errno.EINVAL
        assert open_files() == before


def test_no_device() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        lowlevel.open_device(os.O_CLOEXEC, "/dev/no-such-device")
    assert caught.value.errno == errno.ENOENT


def test_a_device_that_is_not_one() -> None:
    before = open_files()
    with pytest.raises(UffdOSError) as caught:
        lowlevel.open_device(os.O_CLOEXEC, "/dev/null")
    assert caught.value.errno == errno.ENOTTY
    assert open_files() == before


def open_without_the_syscall() -> list[object]:
    """Without CAP_SYS_PTRACE the syscall is refused, but root may open the device."""
    drop_capability("CAP_SYS_PTRACE")
    with pytest.raises(UffdPermissionError):
        lowlevel.open_syscall(os.O_CLOEXEC)
    with Userfaultfd() as uffd:
        return [int(uffd.supported), os.readlink(f"/proc/self/fd/{uffd.fileno()}")]


@needs_device()
@needs_refusal()
@needs_privilege("CAP_SYS_PTRACE")
def test_device_where_the_syscall_is_refused() -> None:
    found = run_child(open_without_the_syscall).value
    assert found == [kernel_features(), "anon_inode:[userfaultfd]"]


# Userfaultfd()


def test_what_is_offered_and_what_is_granted() -> None:
    with Userfaultfd() as uffd:
        assert int(uffd.supported) == kernel_features()
        assert uffd.features == Feature(0)
        assert Ioctl.REGISTER | Ioctl.UNREGISTER | Ioctl.API in uffd.ioctls
        assert not os.get_blocking(uffd.fileno())
        assert not os.get_inheritable(uffd.fileno())


def test_probe_descriptor_is_closed() -> None:
    before = open_files()
    with Userfaultfd():
        assert open_files() == before + 1
    assert open_files() == before


def test_blocking() -> None:
    with Userfaultfd(nonblocking=False) as uffd:
        assert os.get_blocking(uffd.fileno())


@needs_kernel_faults()
@pytest.mark.parametrize(
    "bit",
    [
        pytest.param(bit, marks=needs_privilege("CAP_SYS_PTRACE") if bit == EVENT_FORK_BIT else ())
        for bit in range(19)
    ],
)
def test_each_known_feature(bit: int) -> None:
    feature = Feature(1 << bit)
    assert feature in list(Feature)
    before = open_files()
    if kernel_features() >> bit & 1:
        with Userfaultfd(features=feature) as uffd:
            assert uffd.features == feature
            fdinfo = Path(f"/proc/self/fdinfo/{uffd.fileno()}").read_text()
            negotiated = int(fdinfo.split("API:")[1].split(":")[1], 16)
            assert negotiated >> bit & 1
    else:
        with pytest.raises(UnsupportedFeatureError):
            Userfaultfd(features=feature)
    assert open_files() == before


@needs_kernel_faults()
@needs_privilege("CAP_SYS_PTRACE")
def test_everything_this_kernel_offers() -> None:
    # The two kinds of write-protection exclude each other.
    wanted = Feature(kernel_features() & ~int(Feature.RWP | Feature.RWP_ASYNC | Feature.WP_ASYNC))
    with Userfaultfd(features=wanted) as uffd:
        assert uffd.features == wanted


@pytest.mark.parametrize("unknown", [Feature(1 << 40), Feature(1 << 40) | Feature.THREAD_ID])
def test_unknown_feature(unknown: Feature) -> None:
    before = open_files()
    with pytest.raises(UnsupportedFeatureError) as caught:
        Userfaultfd(features=unknown)
    error = caught.value
    assert error.errno == errno.EINVAL
    assert error.requested == int(unknown)
    assert error.supported == kernel_features()
    assert error.missing == 1 << 40
    assert hex(1 << 40) in str(error)
    assert open_files() == before


# Closing


def test_closing_twice() -> None:
    before = open_files()
    uffd = Userfaultfd()
    assert f"fd={uffd.fileno()}" in repr(uffd)
    assert not uffd.closed
    uffd.close()
    uffd.close()
    assert uffd.closed
    assert "closed" in repr(uffd)
    assert open_files() == before


def test_second_close_leaves_a_reused_number_alone() -> None:
    uffd = Userfaultfd()
    number = uffd.fileno()
    uffd.close()
    other = os.open("/dev/null", os.O_RDONLY)
    os.dup2(other, number)
    try:
        uffd.close()
        os.fstat(number)
    finally:
        for descriptor in {other, number}:
            os.close(descriptor)


CALLS: dict[str, Callable[[Userfaultfd, int], object]] = {
    "fileno": lambda uffd, at: uffd.fileno(),
    "register": lambda uffd, at: uffd.register(at, PAGE),
    "unregister": lambda uffd, at: uffd.unregister(at, PAGE),
    "wake": lambda uffd, at: uffd.wake(at, PAGE),
    "copy": lambda uffd, at: uffd.copy(at, bytes(PAGE)),
    "zeropage": lambda uffd, at: uffd.zeropage(at, PAGE),
    "move": lambda uffd, at: uffd.move(at, at + PAGE, PAGE),
    "continue_": lambda uffd, at: uffd.continue_(at, PAGE),
    "poison": lambda uffd, at: uffd.poison(at, PAGE),
    "writeprotect": lambda uffd, at: uffd.writeprotect(at, PAGE),
    "rwprotect": lambda uffd, at: uffd.rwprotect(at, PAGE),
    "set_mode": lambda uffd, at: uffd.set_mode(enable=Feature.RWP_ASYNC),
    "fill_copy": lambda uffd, at: uffd.fill_copy(at, bytes(PAGE)),
    "fill_zero": lambda uffd, at: uffd.fill_zero(at, PAGE),
    "fill_move": lambda uffd, at: uffd.fill_move(at, at + PAGE, PAGE),
    "fill_continue": lambda uffd, at: uffd.fill_continue(at, PAGE),
    "fill_poison": lambda uffd, at: uffd.fill_poison(at, PAGE),
    "read_events": lambda uffd, at: uffd.read_events(),
    "detach": lambda uffd, at: uffd.detach(),
}


@pytest.mark.parametrize("call", CALLS)
def test_use_after_close(call: str) -> None:
    uffd = Userfaultfd()
    uffd.close()
    with Region.anonymous(2 * PAGE) as region, pytest.raises(ClosedError):
        CALLS[call](uffd, region.start)


def test_detach() -> None:
    uffd = Userfaultfd(features=offered(Feature.THREAD_ID))
    number = uffd.fileno()
    fd = uffd.detach()
    try:
        assert fd == number
        assert uffd.closed
        uffd.close()
        os.fstat(fd)
        with pytest.raises(ClosedError):
            uffd.read_events()
        with pytest.raises(ClosedError):
            uffd.detach()
    except BaseException:
        os.close(fd)
        raise
    with Userfaultfd.from_fd(fd) as again:
        assert again.features == offered(Feature.THREAD_ID)


def test_forgotten_descriptor_warns_and_is_closed() -> None:
    before = open_files()
    uffd = Userfaultfd()
    with pytest.warns(ResourceWarning, match="unclosed <Userfaultfd fd="):
        del uffd
        gc.collect()
    assert open_files() == before


def test_forgotten_descriptor_is_closed_where_warnings_are_errors(
    recwarn: pytest.WarningsRecorder,
) -> None:
    script = (
        "import gc, os, sys\n"
        "from pyuffd import Userfaultfd\n"
        "sys.unraisablehook = lambda unraisable: print(unraisable.exc_type.__name__)\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "uffd = Userfaultfd()\n"
        "del uffd\n"
        "gc.collect()\n"
        "print(len(os.listdir('/proc/self/fd')) == before)\n"
    )
    assert run_child(script).stdout.split() == ["ResourceWarning", "True"]
    assert not recwarn.list


def test_no_warning_for_what_was_never_opened(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(UnsupportedFeatureError):
        Userfaultfd(features=Feature(1 << 40))
    gc.collect()
    assert not recwarn.list


# No descriptor left


def without_descriptors(call: str) -> list[int]:
    """Open or adopt a userfaultfd when this process may have no more files."""
    adoptable = lowlevel.open_syscall(os.O_CLOEXEC)
    lowlevel.api(adoptable, 0)
    before = open_files()
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    with pytest.raises(OSError) as caught:
        Userfaultfd() if call == "open" else Userfaultfd.from_fd(adoptable)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.fstat(adoptable)
    return [caught.value.errno or 0, open_files() - before]


@needs_syscall()
@pytest.mark.parametrize("call", ["open", "adopt"])
def test_no_descriptor_left(call: str) -> None:
    assert run_child(without_descriptors, call).value == [errno.EMFILE, 0]


# Unprivileged


def refused() -> dict[str, object]:
    become_nobody()
    before = open_files()
    with pytest.raises(UffdPermissionError) as caught:
        Userfaultfd()
    error = caught.value
    return {
        "errno": error.errno,
        "hint": error.hint,
        "text": str(error),
        "left open": open_files() - before,
    }


@needs_refusal()
@needs_privilege("CAP_SYS_ADMIN")
def test_refusal_says_what_would_help() -> None:
    found = run_child(refused).value
    assert found["errno"] in {errno.EPERM, errno.EACCES}
    wanted = ["user_mode_only=True", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1", "EFAULT"]
    for what in [*wanted, str(DEVICE)]:
        assert what in found["hint"]
        assert what in found["text"]
    if DEVICE.exists():
        assert "crw" in found["hint"]
    assert found["left open"] == 0


IN_A_USER_NAMESPACE = """
import ctypes, os
import pyuffd._refusals
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
assert ctypes.CDLL(None).unshare(0x10000000) == 0, "no user namespace"
from pyuffd import Userfaultfd, UffdPermissionError
try:
    Userfaultfd()
except UffdPermissionError as error:
    print(error.hint)
"""


@needs_refusal()
@needs_privilege("CAP_SYS_ADMIN")
def test_a_user_namespace_is_named() -> None:
    """It gives every capability, but not in the namespace that counts."""
    command = [sys.executable, "-c", IN_A_USER_NAMESPACE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no user namespace" in done.stderr:
        pytest.skip("user namespaces cannot be made here")
    assert "in the initial user namespace" in done.stdout, done.stderr


def unprivileged_user_mode() -> list[int]:
    become_nobody()
    with Region.anonymous(PAGE) as region, Userfaultfd(user_mode_only=True) as uffd:
        uffd.register(region)
        task = Task(region.read, 0, 1)
        fault = next_fault(uffd)
        assert fault.address == region.start
        uffd.copy(region.start, b"\x07" * PAGE)
        return [task.result()[0], int(uffd.supported)]


@needs_privilege("CAP_SYS_ADMIN")
def test_user_mode_only_needs_no_privilege() -> None:
    assert run_child(unprivileged_user_mode).value == [7, kernel_features()]


def fork_event_without_ptrace(how: str) -> dict[str, object]:
    if how == "nobody":
        become_nobody()
    else:
        drop_capability("CAP_SYS_PTRACE")
    before = open_files()
    with pytest.raises(UffdPermissionError) as caught:
        Userfaultfd(features=Feature.EVENT_FORK, user_mode_only=True)
    error = caught.value
    return {
        "errno": error.errno,
        "hint": error.hint,
        "text": str(error),
        "left open": open_files() - before,
    }


@needs(Feature.EVENT_FORK)
@needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
@pytest.mark.parametrize("how", ["nobody", "capability"])
def test_fork_events_need_ptrace(how: str) -> None:
    found = run_child(fork_event_without_ptrace, how).value
    assert found["errno"] == errno.EPERM
    assert "CAP_SYS_PTRACE" in found["hint"]
    assert "CAP_SYS_PTRACE" in found["text"]
    assert found["left open"] == 0


# USER_MODE_ONLY


def test_user_mode_only_turns_kernel_access_into_efault() -> None:
    zeros = os.open("/dev/zero", os.O_RDONLY)
    try:
        with Region.anonymous(2 * PAGE) as region, Userfaultfd(user_mode_only=True) as uffd:
            uffd.register(region)
            view = region.memoryview()
            with pytest.raises(OSError) as caught:
                os.readv(zeros, [view[:16]])
            assert caught.value.errno == errno.EFAULT
            assert uffd.read_events() == []
            # The same access, once the page is present.
            uffd.copy(region.start, b"\xff" * PAGE)
            assert os.readv(zeros, [view[:16]]) == 16
            assert region.read(0, 17) == bytes(16) + b"\xff"
            del view
    finally:
        os.close(zeros)


@needs_kernel_faults()
def test_kernel_access_waits_without_user_mode_only() -> None:
    zeros = os.open("/dev/zero", os.O_RDONLY)
    try:
        with Region.anonymous(PAGE) as region, Userfaultfd() as uffd:
            uffd.register(region)
            view = region.memoryview()
            task = Task(os.readv, zeros, [view[:16]])
            assert next_fault(uffd).address == region.start
            uffd.copy(region.start, b"\xff" * PAGE)
            assert task.result() == 16
            assert region.read(0, 17) == bytes(16) + b"\xff"
            del view
    finally:
        os.close(zeros)


def test_flags_reach_the_descriptor() -> None:
    fd = lowlevel.open_syscall(os.O_CLOEXEC | USER_MODE_ONLY)
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.get_blocking(fd)
    finally:
        os.close(fd)


def without_a_descriptor(way: str) -> None:
    if way == "device":
        drop_capability("CAP_SYS_PTRACE")
    free = os.dup(0)
    os.close(free)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    with pytest.raises(UffdOSError, match=rf"RLIMIT_NOFILE is {free} .*ulimit -n") as caught:
        Userfaultfd()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert caught.value.errno == errno.EMFILE


@pytest.mark.parametrize("way", ["syscall", pytest.param("device", marks=needs_device())])
def test_names_the_limit_of_descriptors(way: str) -> None:
    """Also to a user whom the system call refuses, and who may open the device."""
    run_child(without_a_descriptor, way)
