"""The exceptions: which errno becomes which class with which data, and that all can be pickled."""

from __future__ import annotations

import copy
import errno
import os
import pickle

import pytest

import pyuffd
from pyuffd import (
    ClosedError,
    HandlerError,
    LayoutChangedError,
    PageExistsError,
    PartialResolveError,
    ProcessGoneError,
    RangeBusyError,
    UffdError,
    UffdOSError,
    UffdPermissionError,
    UnsupportedFeatureError,
)
from pyuffd._errors import raise_errno

START, LENGTH = 0x7F00_0000_1000, 0x3000

# errno, our class, the builtin that Python picks for the errno
TREE = [
    (errno.EPERM, UffdPermissionError, PermissionError),
    (errno.EACCES, UffdPermissionError, PermissionError),
    (errno.EBUSY, RangeBusyError, OSError),
    (errno.EEXIST, PageExistsError, FileExistsError),
    (errno.EAGAIN, PartialResolveError, BlockingIOError),
    (errno.ENOENT, LayoutChangedError, FileNotFoundError),
    (errno.ESRCH, ProcessGoneError, ProcessLookupError),
    (errno.EINVAL, UffdOSError, OSError),
    (errno.EFAULT, UffdOSError, OSError),
    (errno.ENOMEM, UffdOSError, OSError),
    # A full tmpfs or no free huge page, not an owner that has exited.
    (errno.ENOSPC, UffdOSError, OSError),
    (9999, UffdOSError, OSError),
]


def raised(code: int, **data: int) -> UffdOSError:
    with pytest.raises(UffdOSError) as caught:
        raise_errno("UFFDIO_COPY", code, START, LENGTH, hint="try harder", **data)
    return caught.value


@pytest.mark.parametrize(("code", "cls", "builtin"), TREE)
def test_errno_to_class(code: int, cls: type[UffdOSError], builtin: type[OSError]) -> None:
    error = raised(code)
    assert type(error) is cls
    assert isinstance(error, builtin)
    # PEP 3151's own choice for this errno catches ours as well.
    assert isinstance(error, type(OSError(code, "")))
    assert error.errno == code
    assert (error.op, error.start, error.length) == ("UFFDIO_COPY", START, LENGTH)
    assert error.hint == "try harder"


@pytest.mark.parametrize("code", sorted({row[0] for row in TREE}))
def test_text_has_the_values(code: int) -> None:
    text = str(raised(code, completed=0x1000))
    for part in ("UFFDIO_COPY", hex(START), hex(LENGTH), os.strerror(code), "0x1000", "try harder"):
        assert part in text


@pytest.mark.parametrize("code", sorted({row[0] for row in TREE}))
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(code: int, protocol: int) -> None:
    error = raised(code, completed=0x2000)
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
        assert again.errno == code


def test_partial_count_defaults_to_nothing_done() -> None:
    error = raised(errno.EAGAIN)
    assert isinstance(error, PartialResolveError)
    assert error.completed == 0


def test_partial_count_is_kept() -> None:
    error = raised(errno.EAGAIN, completed=4096)
    assert isinstance(error, PartialResolveError)
    assert error.completed == 4096


def test_range_may_be_absent() -> None:
    with pytest.raises(UffdOSError) as caught:
        raise_errno("read", errno.EIO)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.start, error.length, error.hint) == (None, None, "")


def test_start_alone_is_named() -> None:
    with pytest.raises(UffdOSError) as caught:
        raise_errno("pagemap runs", errno.ENOMEM, START)
    assert hex(START) in str(caught.value)


def test_unsupported_feature_carries_the_masks() -> None:
    error = UnsupportedFeatureError(errno.EINVAL, "UFFDIO_API", requested=3, supported=1, missing=2)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert (each.requested, each.supported, each.missing) == (3, 1, 2)
        assert each.errno == errno.EINVAL


def test_handler_error() -> None:
    cause = OSError(errno.EIO, "disk")
    error = HandlerError("source failed", START, LENGTH)
    error.__cause__ = cause
    again = pickle.loads(pickle.dumps(error))
    assert issubclass(HandlerError, RuntimeError)
    assert type(again) is HandlerError
    assert (str(again), again.start, again.length) == ("source failed", START, LENGTH)
    assert error.__cause__ is cause


def test_closed_error() -> None:
    again = pickle.loads(pickle.dumps(ClosedError("closed")))
    assert isinstance(again, ValueError)
    assert str(again) == "closed"


def test_one_root() -> None:
    public = [getattr(pyuffd, name) for name in pyuffd.__all__]
    errors = [cls for cls in public if isinstance(cls, type) and issubclass(cls, Exception)]
    assert len(errors) > 10
    assert [cls for cls in errors if not issubclass(cls, UffdError)] == []
