"""userfaultfd(2), UFFDIO_API(2const), and what every ioctl checks first (layer L5).

ENFILE and ENOMEM of userfaultfd(2) are left out; `_left_out` says why.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Callable
from pathlib import Path

from pyuffd._abi import USER_MODE_ONLY, Feature, Ioctl
from pyuffd._memory import buffer_address
from pyuffd.conformance import _raw
from pyuffd.conformance._case import case
from pyuffd.conformance._context import WAIT_S, Child, Context
from pyuffd.conformance._pin import syscall
from pyuffd.conformance._spec import Variant
from pyuffd.conformance._types import ANY
from pyuffd.regions import Region
from pyuffd.testing import _opening
from pyuffd.testing._need import needs, needs_device, needs_privilege, needs_syscall

API = 0xAA
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
SYS_READ, SYS_OPEN, SYS_IOCTL, SYS_SETRESUID = 0, 2, 16, 117
SYS_PRLIMIT64, SYS_USERFAULTFD = 302, 323
RLIMIT_NOFILE = 7
SYS_CAPGET, SYS_CAPSET, SYS_UNSHARE = 125, 126, 272
CAPABILITY_VERSION_3, CAP_SYS_PTRACE, MASK_32 = 0x20080522, 19, 0xFFFFFFFF
CLONE_NEWUSER = 0x10000000
NOBODY = 65534
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
UNKNOWN_FLAG = 1 << 1
UNKNOWN_FEATURE = 1 << 63
UNKNOWN_IOCTL = 0xAA3E
AFTER_API = (
    "REGISTER",
    "UNREGISTER",
    "WAKE",
    "COPY",
    "ZEROPAGE",
    "MOVE",
    "WRITEPROTECT",
    "CONTINUE",
    "POISON",
)


# UFFDIO_API reports the ioctls of the descriptor only; UFFDIO_REGISTER reports those of a range.
KNOWN_IOCTLS = (
    *(Ioctl.API, Ioctl.REGISTER, Ioctl.UNREGISTER, Ioctl.WAKE, Ioctl.COPY, Ioctl.ZEROPAGE),
    *(Ioctl.MOVE, Ioctl.WRITEPROTECT, Ioctl.CONTINUE, Ioctl.POISON),
)


def fresh(ctx: Context, flags: int = FLAGS) -> int:
    """Return a descriptor before its handshake; it is closed when the case ends."""
    fd = _opening.open_userfaultfd(flags)
    ctx.callback(os.close, fd)
    return fd


def _ready(ctx: Context) -> int:
    fd = fresh(ctx)
    ctx.expect("errno of the handshake", ctx.ioctl("API", API, uffd=fd).errno, 0)
    return fd


def _unprivileged(ctx: Context) -> Child:
    child = ctx.fork_only()
    ctx.expect("setresuid", child.syscall(SYS_SETRESUID, NOBODY, NOBODY, NOBODY), 0)
    return child


@case("userfaultfd.ok.cloexec-nonblock", origin="userfaultfd(2): DESCRIPTION", memory=ANY)
def open_flags(ctx: Context) -> None:
    """The descriptor has O_CLOEXEC and O_NONBLOCK if and only if requested."""
    both, neither = fresh(ctx), fresh(ctx, 0)
    ctx.expect("O_CLOEXEC", [os.get_inheritable(fd) for fd in (both, neither)], [False, True])
    ctx.expect("O_NONBLOCK", [os.get_blocking(fd) for fd in (both, neither)], [False, True])


@case(
    "userfaultfd.ok.descriptor",
    origin="fs/userfaultfd.c: new_userfaultfd, O_RDONLY",
    memory=ANY,
    variants=[
        Variant("read-only", "the descriptor is open for reading only"),
        Variant(
            "read-write",
            "the descriptor is open for reading and writing",
            lacks=Feature.WP_UNPOPULATED,
        ),
    ],
)
def descriptor(ctx: Context) -> None:
    """The descriptor is an anonymous file that can be neither written nor mapped."""
    fd = _ready(ctx)
    ctx.expect("its link", os.readlink(f"/proc/self/fd/{fd}"), "anon_inode:[userfaultfd]")
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    code = ctx.expect_variant("access mode", mode, read_only=os.O_RDONLY, read_write=os.O_RDWR)
    wanted = errno.EBADF if code == "read-only" else errno.EINVAL
    ctx.expect_errno(wanted, os.write, fd, b"\1")
    ctx.expect_errno(errno.ENODEV, mmap.mmap, fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)


@case(
    "userfaultfd.EINVAL.sysctl",
    origin="fs/userfaultfd.c: vm_userfaultfd_table",
    memory=ANY,
    needs=[needs_privilege("CAP_SYS_ADMIN")],
)
def sysctl(ctx: Context) -> None:
    """vm.unprivileged_userfaultfd accepts only 0 and 1."""
    before = SYSCTL.read_text()
    try:
        SYSCTL.write_text(before)
    except OSError as error:  # as in a container
        ctx.lack("sysctl", f"{SYSCTL}: {error.strerror}")
    ctx.callback(SYSCTL.write_text, before)
    for value in ("2", "-1"):
        ctx.expect_errno(errno.EINVAL, SYSCTL.write_text, value)
    ctx.expect("value afterwards", SYSCTL.read_text(), before)


@case(
    "userfaultfd.EINVAL.flags-unknown",
    origin="userfaultfd(2): EINVAL",
    memory=ANY,
    needs=[needs_syscall()],
)
def open_unknown_flag(ctx: Context) -> None:
    """An unknown flag is refused."""
    ctx.expect_errno(errno.EINVAL, _opening.open_syscall, FLAGS | UNKNOWN_FLAG)


@case(
    "userfaultfd.EMFILE.descriptor-limit",
    origin="userfaultfd(2): EMFILE",
    memory=ANY,
    needs=[needs_syscall()],
)
def open_emfile(ctx: Context) -> None:
    """At RLIMIT_NOFILE, no userfaultfd can be opened."""
    limit = struct.pack("=2Q", 0, 0)
    address, _, _owner = buffer_address(limit)
    child = ctx.fork_only()
    ctx.expect("prlimit64", child.syscall(SYS_PRLIMIT64, 0, RLIMIT_NOFILE, address, 0), 0)
    ctx.expect("userfaultfd(2)", child.syscall(SYS_USERFAULTFD, FLAGS), -errno.EMFILE)


@case(
    "userfaultfd.EPERM.unprivileged",
    origin="userfaultfd(2): EPERM",
    memory=ANY,
    needs=[needs_privilege()],
    variants=[
        Variant("refused", "vm.unprivileged_userfaultfd is 0 (its file says so)"),
        Variant("allowed", "vm.unprivileged_userfaultfd is 1 (its file says so)"),
    ],
)
def open_unprivileged(ctx: Context) -> None:
    """Without privilege, handling kernel faults needs vm.unprivileged_userfaultfd=1."""
    child = _unprivileged(ctx)
    fd = child.syscall(SYS_USERFAULTFD, FLAGS)
    allowed = SYSCTL.read_text().strip() == "1"
    ctx.expect_variant("userfaultfd(2)", fd if fd < 0 else 0, refused=-errno.EPERM, allowed=0)
    ctx.expect("variant, by the sysctl", ctx.variant, "allowed" if allowed else "refused")


@case(
    "userfaultfd.ok.unprivileged-user-mode-only",
    origin="userfaultfd(2): UFFD_USER_MODE_ONLY",
    memory=ANY,
    needs=[needs_privilege()],
    variants=[
        Variant("known", "any user may open a userfaultfd with UFFD_USER_MODE_ONLY"),
        Variant(
            "unknown",
            "the flag is refused with EINVAL",
            lacks=Feature.MINOR_HUGETLBFS,
        ),
    ],
)
def open_user_mode_only(ctx: Context) -> None:
    """UFFD_USER_MODE_ONLY works without privilege."""
    fd = _unprivileged(ctx).syscall(SYS_USERFAULTFD, FLAGS | USER_MODE_ONLY)
    ctx.expect_variant("userfaultfd(2)", min(fd, 0), known=0, unknown=-errno.EINVAL)


@case(
    "userfaultfd-device.EACCES.mode",
    origin="userfaultfd(2): /dev/userfaultfd",
    memory=ANY,
    needs=[needs_privilege(), needs_device()],
)
def device_mode(ctx: Context) -> None:
    """/dev/userfaultfd obeys its file mode."""
    device = Path("/dev/userfaultfd")
    address, _, _owner = buffer_address(bytes(device) + b"\0")
    wanted = 0 if device.stat().st_mode & 0o006 == 0o006 else -errno.EACCES
    fd = _unprivileged(ctx).syscall(SYS_OPEN, address, os.O_RDWR)
    ctx.expect("open(2)", min(fd, 0), wanted)


@case(
    "userfaultfd-device.EINVAL.flags-unknown",
    origin="userfaultfd(2): /dev/userfaultfd",
    memory=ANY,
    needs=[needs_device()],
)
def device_unknown_flag(ctx: Context) -> None:
    """USERFAULTFD_IOC_NEW refuses an unknown flag."""
    ctx.expect_errno(errno.EINVAL, _opening.open_device, FLAGS | UNKNOWN_FLAG)


@case(
    "userfaultfd-device.EINVAL.ioctl-unknown",
    origin="fs/userfaultfd.c: userfaultfd_dev_ioctl",
    memory=ANY,
    needs=[needs_device()],
)
def device_unknown_ioctl(ctx: Context) -> None:
    """/dev/userfaultfd refuses every request but USERFAULTFD_IOC_NEW."""
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    ctx.callback(os.close, device)
    for number in (UNKNOWN_IOCTL, _raw.request("API"), 0xAA01):
        ctx.expect_errno(errno.EINVAL, fcntl.ioctl, device, number, 0)


@case(
    "userfaultfd-device.ok.flags",
    origin="fs/userfaultfd.c: userfaultfd_dev_ioctl, new_userfaultfd",
    memory=ANY,
    needs=[needs_device()],
)
def device_flags(ctx: Context) -> None:
    """A descriptor from the device has O_CLOEXEC and O_NONBLOCK if and only if requested."""
    for flags in (FLAGS, 0, os.O_CLOEXEC, os.O_NONBLOCK):
        fd = _opening.open_device(flags)
        ctx.callback(os.close, fd)
        seen = (os.get_inheritable(fd), os.get_blocking(fd))
        wanted = (not flags & os.O_CLOEXEC, not flags & os.O_NONBLOCK)
        ctx.expect(f"inheritable and blocking with {flags:#x}", seen, wanted)


@case(
    "userfaultfd-device.ok.user-mode-only",
    origin="fs/userfaultfd.c: userfaultfd_dev_ioctl, UFFD_USER_MODE_ONLY",
    memory=ANY,
    needs=[needs_device()],
)
def device_user_mode_only(ctx: Context) -> None:
    """A descriptor from the device gets kernel faults unless UFFD_USER_MODE_ONLY is set."""
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    ctx.callback(os.close, zero)
    for flags in (FLAGS | USER_MODE_ONLY, FLAGS):
        fd = _opening.open_device(flags)
        ctx.callback(os.close, fd)
        ctx.expect("errno of the handshake", ctx.ioctl("API", API, uffd=fd).errno, 0)
        region = ctx.make(1, "anon")
        answer = ctx.ioctl("REGISTER", region.start, region.length, 1, uffd=fd)
        ctx.expect("errno of REGISTER", answer.errno, 0)
        reading = ctx.start(syscall, SYS_READ, zero, region.start, 1)
        if flags & USER_MODE_ONLY:
            ctx.expect("read(2)", reading.result(), -errno.EFAULT)
            continue
        if not select.select([fd], [], [], WAIT_S)[0]:
            ctx.fail("messages", f"none within {WAIT_S:g} s", "the message of read(2)'s fault")
        ctx.expect("bytes of the message", len(os.read(fd, 64)), 32)
        answer = ctx.ioctl("ZEROPAGE", region.start, region.length, uffd=fd)
        ctx.expect("errno of ZEROPAGE", answer.errno, 0)
        ctx.expect("read(2)", reading.result(), 1)


@case(
    "UFFDIO_API.EPERM.event-fork-unprivileged",
    origin="UFFDIO_API(2const): EPERM",
    memory=ANY,
    needs=[needs_privilege(), needs(Feature.EVENT_FORK)],
    variants=[
        Variant("EPERM", "EVENT_FORK needs CAP_SYS_PTRACE"),
        Variant(
            "no-descriptor",
            "without UFFD_USER_MODE_ONLY, the process cannot open a userfaultfd",
            lacks=Feature.MINOR_HUGETLBFS,
        ),
    ],
)
def api_event_fork(ctx: Context) -> None:
    """Without CAP_SYS_PTRACE, EVENT_FORK is refused and the argument is zeroed."""
    argument = ctx.make(1, "shmem")
    argument.write(0, struct.pack("=3Q", API, Feature.EVENT_FORK, 0))
    child = _unprivileged(ctx)
    fd = child.syscall(SYS_USERFAULTFD, FLAGS | USER_MODE_ONLY)
    if fd < 0:
        ctx.expect_variant("userfaultfd", fd, no_descriptor=-errno.EINVAL)
        return
    seen = child.syscall(SYS_IOCTL, fd, _raw.request("API"), argument.start)
    ctx.expect_variant("UFFDIO_API", seen, EPERM=-errno.EPERM)
    ctx.expect("argument", argument.read(0, 24), bytes(24))
    argument.write(0, struct.pack("=3Q", API, 0, 0))
    seen = child.syscall(SYS_IOCTL, fd, _raw.request("API"), argument.start)
    ctx.expect("UFFDIO_API without EVENT_FORK", seen, 0)


# Which capability counts, and in which user namespace


def _capset(ctx: Context, child: Child, argument: Region, effective: int) -> None:
    """Drop all capabilities of a child except these."""
    header, data = argument.start, argument.start + 8
    argument.write(0, struct.pack("=2I", CAPABILITY_VERSION_3, 0))
    ctx.expect("capget", child.syscall(SYS_CAPGET, header, data), 0)
    found = list(struct.unpack("=6I", argument.read(8, 24)))
    for half in range(2):  # each has an effective, a permitted and an inheritable word
        found[3 * half] = found[3 * half + 1] & effective >> 32 * half & MASK_32
    argument.write(8, struct.pack("=6I", *found))
    ctx.expect("capset", child.syscall(SYS_CAPSET, header, data), 0)


def _only_ptrace(ctx: Context, child: Child, argument: Region) -> None:
    _capset(ctx, child, argument, 1 << CAP_SYS_PTRACE)


def _all_but_ptrace(ctx: Context, child: Child, argument: Region) -> None:
    _capset(ctx, child, argument, ~(1 << CAP_SYS_PTRACE))


def _user_namespace(ctx: Context, child: Child, _: Region) -> None:
    if code := child.syscall(SYS_UNSHARE, CLONE_NEWUSER):
        ctx.lack("user-namespaces", f"unshare: {errno.errorcode.get(-code, code)}")


def _add_privilege(
    name: str, text: str, become: Callable[[Context, Child, Region], None], *, suffices: bool
) -> None:
    def run(ctx: Context) -> None:
        argument = ctx.make(1, "shmem")
        child = ctx.fork_only()
        become(ctx, child, argument)
        fd = child.syscall(SYS_USERFAULTFD, FLAGS)
        allowed = suffices or SYSCTL.read_text().strip() == "1"
        ctx.expect("userfaultfd", min(fd, 0), 0 if allowed else -errno.EPERM)
        fd = child.syscall(SYS_USERFAULTFD, FLAGS | USER_MODE_ONLY)
        if fd < 0:
            ctx.lack("user-mode-only", f"userfaultfd: {errno.errorcode.get(-fd, fd)}")
        argument.write(0, struct.pack("=3Q", API, Feature.EVENT_FORK, 0))
        seen = child.syscall(SYS_IOCTL, fd, _raw.request("API"), argument.start)
        ctx.expect("UFFDIO_API with EVENT_FORK", seen, 0 if suffices else -errno.EPERM)

    case(
        f"userfaultfd.{'ok' if suffices else 'EPERM'}.{name}",
        summary=f"A process with {text} {'may' if suffices else 'may not'} handle kernel"
        " faults or enable EVENT_FORK",
        origin="fs/userfaultfd.c: capable(CAP_SYS_PTRACE)",
        memory=ANY,
        needs=[needs_privilege("CAP_SYS_PTRACE"), needs(Feature.EVENT_FORK)],
    )(run)


_add_privilege("only-ptrace", "CAP_SYS_PTRACE and no other capability", _only_ptrace, suffices=True)
_add_privilege(
    "all-but-ptrace", "every capability but CAP_SYS_PTRACE", _all_but_ptrace, suffices=False
)
_add_privilege(
    "user-namespace",
    "every capability in a user namespace of its own",
    _user_namespace,
    suffices=False,
)


@case("UFFDIO_API.ok.reply", origin="UFFDIO_API(2const): DESCRIPTION", memory=ANY)
def api_reply(ctx: Context) -> None:
    """The reply lists all features of the kernel, whichever are requested."""
    answers = [ctx.ioctl("API", API, asked, uffd=fresh(ctx)) for asked in (0, ctx.offered & 0x80)]
    for answer in answers:
        ctx.expect("errno and reply", (answer.errno, answer.words[:2]), (0, (API, ctx.offered)))
        known = sum(int(each) for each in KNOWN_IOCTLS)
        wanted = int(Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER)
        ctx.expect("known ioctls of a descriptor", answer.words[2] & known, wanted)


@case("UFFDIO_API.EINVAL.api-unknown", origin="UFFDIO_API(2const): EINVAL", memory=ANY)
def api_version(ctx: Context) -> None:
    """An unknown API version is refused, the argument zeroed; a correct handshake then works."""
    _refused_once(ctx, API + 1, 0)


@case("UFFDIO_API.EINVAL.features-unknown", origin="UFFDIO_API(2const): EINVAL", memory=ANY)
def api_features(ctx: Context) -> None:
    """An unknown feature is refused, the argument zeroed; a correct handshake then works."""
    _refused_once(ctx, API, UNKNOWN_FEATURE)


def _refused_once(ctx: Context, api: int, features: int) -> None:
    fd = fresh(ctx)
    answer = ctx.ioctl("API", api, features, uffd=fd)
    ctx.expect("errno and argument", (answer.errno, answer.words), (errno.EINVAL, (0, 0, 0)))
    ctx.expect("errno of a correct handshake afterwards", ctx.ioctl("API", API, uffd=fd).errno, 0)


@case("UFFDIO_API.EINVAL.second-handshake", origin="UFFDIO_API(2const): EINVAL", memory=ANY)
def api_second(ctx: Context) -> None:
    """A second handshake is refused, and the descriptor stays usable."""
    fd = _ready(ctx)
    answer = ctx.ioctl("API", API, uffd=fd)
    ctx.expect("errno and argument", (answer.errno, answer.words), (errno.EINVAL, (0, 0, 0)))
    ctx.expect("errno of WAKE", ctx.ioctl("WAKE", 1 << 20, 4096, uffd=fd).errno, 0)


@case("UFFDIO_API.EFAULT.argument", origin="UFFDIO_API(2const): EFAULT", memory=ANY)
def api_argument(ctx: Context) -> None:
    """An argument at an unmapped address is EFAULT."""
    ctx.expect_errno(errno.EFAULT, fcntl.ioctl, fresh(ctx), _raw.request("API"), 0)


@case("ioctl.EINVAL.unknown", origin="ioctl_userfaultfd(2)", memory=ANY)
def unknown_ioctl(ctx: Context) -> None:
    """An unknown request number is EINVAL, before and after the handshake."""
    fd = fresh(ctx)
    ctx.expect_errno(errno.EINVAL, fcntl.ioctl, fd, UNKNOWN_IOCTL, 0)
    ctx.expect("errno of the handshake", ctx.ioctl("API", API, uffd=fd).errno, 0)
    ctx.expect_errno(errno.EINVAL, fcntl.ioctl, fd, UNKNOWN_IOCTL, 0)


def _feature_of(name: str) -> Feature:
    return {
        "MOVE": Feature.MOVE,
        "POISON": Feature.POISON,
        "CONTINUE": Feature.MINOR_SHMEM,
    }.get(name, Feature(0))


def _add_generic(name: str) -> None:
    def before(ctx: Context) -> None:
        region = ctx.make(1)
        words = (region.start, region.length, 1) if name == "REGISTER" else (region.start, 4096)
        answer = ctx.ioctl(name, *words, uffd=fresh(ctx))
        ctx.expect("errno before the handshake", answer.errno, errno.EINVAL)

    def argument(ctx: Context) -> None:
        ctx.expect_errno(errno.EFAULT, fcntl.ioctl, _ready(ctx), _raw.request(name), 0)

    case(
        f"UFFDIO_{name}.EINVAL.before-api",
        origin="ioctl_userfaultfd(2): EINVAL",
        memory=ANY,
        summary="Before the handshake, the descriptor accepts only UFFDIO_API",
    )(before)
    case(
        f"UFFDIO_{name}.EFAULT.argument",
        origin="ioctl_userfaultfd(2): EFAULT",
        memory=ANY,
        features=_feature_of(name),
        summary="An argument at an unmapped address is EFAULT",
    )(argument)


for _name in AFTER_API:
    _add_generic(_name)
