"""No module is loaded to explain an error: a server may have called chroot(2) before."""

from __future__ import annotations

import re

import pytest

from pyuffd import Feature
from pyuffd.testing import needs, needs_privilege
from tests._child import run_child

pytestmark = needs(Feature.POISON)

# Run as text, in a fresh process: a fork of another one has loaded everything.
PROGRAM = """
import ctypes, errno, mmap, os, sys, warnings
from pyuffd import BufferSource, CallableSource, Feature, Handler, PagePoisonedError, Region
from pyuffd import RegisterMode, UffdOSError, UffdPermissionError, Userfaultfd

PAGE = 4096


class NoFiles:
    def find_spec(self, name, path=None, target=None):
        raise ImportError(f"no file can be read, so {name} cannot be loaded")


def expect(kind, call, *words):
    try:
        call()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, (missing, str(error))
    else:
        raise AssertionError(f"no {kind.__name__}")


def serve(fails, driver="thread"):
    def read(offset, length):
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return b"x" * length

    features = Feature.SIGBUS if driver == "inline" else Feature(0)
    source = CallableSource(read) if driver == "thread" else BufferSource(b"x" * PAGE)
    with Region.anonymous(PAGE) as region, Userfaultfd(features=features) as uffd:
        with Handler(uffd, driver=driver) as handler:
            handler.serve(region, source)
            assert region.read(0, 1) == b"x"


def served():
    for driver in ("native", "inline", "thread"):
        serve(False, driver)


def lost():
    def failing():
        serve(True)

    expect(PagePoisonedError, failing, "could not be read")


def poisoned():
    with Region.anonymous(PAGE) as region, Userfaultfd() as uffd:
        uffd.register(region, mode=RegisterMode.MISSING)
        uffd.poison(region)
        expect(PagePoisonedError, lambda: region.read(0, 1), "hardware error")


def file_too_short():
    with Region.memfd(PAGE) as region:
        os.ftruncate(region.fd, 0)
        expect(UffdOSError, lambda: region.read(0, 1), "truncated")


def not_registrable():
    with Userfaultfd() as uffd, open(sys.executable, "rb") as program:
        with mmap.mmap(program.fileno(), PAGE, mmap.MAP_PRIVATE) as mapped:
            anchor = ctypes.c_char.from_buffer(mapped)
            region = Region.at(ctypes.addressof(anchor), PAGE)
            expect(UffdOSError, lambda: uffd.register(region, mode=RegisterMode.WP), "python")
            del anchor


def mergeable():
    with Region.anonymous(PAGE) as region, Userfaultfd() as uffd, Handler(uffd) as handler:
        region.madvise(12)  # MADV_MERGEABLE
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            both = RegisterMode.MISSING | RegisterMode.WP
            handler.serve(region, BufferSource(b"x" * PAGE), mode=both)
        assert "KSM" in str(said[0].message), said


def forked():
    with Region.anonymous(PAGE) as region, Userfaultfd() as uffd, Handler(uffd) as handler:
        handler.serve(region, BufferSource(b"x" * PAGE))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
        assert said, said


def refused():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    expect(UffdPermissionError, Userfaultfd, "user_mode_only=True")
"""


ACTIONS = re.findall(r"^def (\w+)\(\):", PROGRAM, re.MULTILINE)


@needs_privilege("CAP_SYS_PTRACE")
@pytest.mark.parametrize("what", ACTIONS)
def test_nothing_is_loaded_late(what: str) -> None:
    run_child(PROGRAM + f"\nsys.meta_path.insert(0, NoFiles())\n{what}()\n")
