"""UFFDIO_API and UFFDIO_REGISTER, as uffd-unit-tests checks them (layer L5)."""

from __future__ import annotations

import errno
import os

from pyuffd._abi import Feature, Ioctl, RegisterMode
from pyuffd.conformance._case import case
from pyuffd.conformance._context import Context
from pyuffd.conformance._types import ANY, minor_features, missing_features, wp_features
from pyuffd.testing import _opening
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import needs_device

_API = 0xAA
_UNKNOWN_FEATURE = 1 << 63
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_DESCRIPTOR_IOCTLS = Ioctl.REGISTER | Ioctl.UNREGISTER | Ioctl.API


def _api(ctx: Context, fd: int) -> None:
    """Check that bad handshakes and a second one are refused, and a correct one accepted."""
    ctx.callback(os.close, fd)
    for words in ((_API + 1, 0), (_API, _UNKNOWN_FEATURE)):
        answer = ctx.ioctl("API", *words, uffd=fd)
        ctx.expect(f"errno of API{words}", answer.errno, errno.EINVAL)
    answer = ctx.ioctl("API", _API, 0, uffd=fd)
    ctx.expect("errno of a correct handshake on the same descriptor", answer.errno, 0)
    ctx.expect("features of the reply", answer.words[1], ctx.offered)
    ctx.expect(
        "REGISTER, UNREGISTER and API in the reply's ioctls",
        answer.words[2] & _DESCRIPTOR_IOCTLS,
        int(_DESCRIPTOR_IOCTLS),
    )
    answer = ctx.ioctl("API", _API, Feature.PAGEFAULT_FLAG_WP, uffd=fd)
    ctx.expect("errno of a second handshake", answer.errno, errno.EINVAL)


@case("kselftest.api-syscall", origin="uffd-unit-tests: UFFDIO_API (with syscall)", memory=ANY)
def api_syscall(ctx: Context) -> None:
    """A descriptor of userfaultfd(2) refuses bad handshakes, and a second one."""
    # Not by the library, which makes the handshake itself.
    _api(ctx, _opening.open_userfaultfd(_FLAGS))


@case(
    "kselftest.api-device",
    origin="uffd-unit-tests: UFFDIO_API (with /dev/userfaultfd)",
    memory=ANY,
    needs=[needs_device()],
)
def api_device(ctx: Context) -> None:
    """A descriptor of /dev/userfaultfd refuses bad handshakes, and a second one."""
    _api(ctx, _opening.open_device(_FLAGS))


def _all_modes(memory: MemoryType) -> Feature:
    minor = Feature(0) if memory.is_anon else minor_features(memory)
    return missing_features(memory) | wp_features(memory) | minor


@case("kselftest.register-ioctls", origin="uffd-unit-tests: register-ioctls", features=_all_modes)
def register_ioctls(ctx: Context) -> None:
    """REGISTER works in every possible mode, and offers the ioctls that resolve its faults."""
    region = ctx.make(1)
    ctx.open()
    for mode in map(RegisterMode, range(8)):
        answer = ctx.ioctl("REGISTER", region.start, ctx.page, mode)
        if not mode or (ctx.memory.is_anon and RegisterMode.MINOR in mode):
            ctx.expect(f"errno of mode {int(mode)}", answer.errno, errno.EINVAL)
            continue
        wanted = Ioctl.WAKE
        for flag, ioctl in (
            (RegisterMode.MISSING, Ioctl.COPY),
            (RegisterMode.WP, Ioctl.WRITEPROTECT),
            (RegisterMode.MINOR, Ioctl.CONTINUE),
        ):
            if flag in mode:
                wanted |= ioctl
        ctx.expect(f"errno of mode {int(mode)}", answer.errno, 0)
        ctx.expect(f"{wanted!r} after mode {int(mode)}", answer.words[3] & wanted, int(wanted))
        ctx.expect("errno of UNREGISTER", ctx.ioctl("UNREGISTER", region.start, ctx.page).errno, 0)
