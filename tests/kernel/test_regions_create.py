"""Region's constructors: what they accept and refuse, and that nothing leaks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyuffd import Region, RegionKind, UffdOSError, UffdPermissionError, Userfaultfd
from pyuffd.testing import needs_hugepages, needs_privilege
from pyuffd.testing._huge_pages import free_hugepages
from pyuffd.testing._memory_types import HUGE_PAGE
from tests.kernel._mounts import mounted

PAGE = 4096
NAME = f"/pyuffd-test-{os.getpid()}"
SHM_FILE = Path("/dev/shm") / NAME[1:]


def mappings() -> set[str]:
    """Return the lines of /proc/self/maps that may belong to this module's memory."""
    known = ("memfd:pyuffd", "/pyuffd-test", "anon_hugepage", "huge-file", "tmpfs-file")
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if has(line, known)}


def has(line: str, names: tuple[str, ...]) -> bool:
    return any(name in line for name in names)


@contextlib.contextmanager
def no_trace() -> Iterator[None]:
    """Assert that the block leaves no descriptor and no mapping of ours."""
    before = (len(os.listdir("/proc/self/fd")), mappings())
    yield
    assert (len(os.listdir("/proc/self/fd")), mappings()) == before


@pytest.fixture(autouse=True)
def _clean_shm() -> Iterator[None]:
    yield
    SHM_FILE.unlink(missing_ok=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tmpfs-file"
    path.write_bytes(b"file" + bytes(4 * PAGE - 4))
    return path


# Lengths and page sizes


@pytest.mark.parametrize("length", [0, -PAGE, 1, PAGE + 1, -1])
@pytest.mark.parametrize(
    "make",
    [
        Region.anonymous,
        Region.memfd,
        lambda length: Region.shm(NAME, length),
    ],
    ids=["anonymous", "memfd", "shm"],
)
def test_bad_lengths(make: Callable[[int], Region], length: int) -> None:
    with no_trace(), pytest.raises(ValueError):
        make(length)
    assert not SHM_FILE.exists()


@pytest.mark.parametrize("length", [0, -PAGE, 1, PAGE + 1, -1])
def test_bad_lengths_of_a_file(file: Path, length: int) -> None:
    with no_trace(), pytest.raises(ValueError):
        Region.file(file, length)


@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd], ids=["anonymous", "memfd"])
@pytest.mark.parametrize("size", [0, -1, PAGE, 3 << 20, 1 << 50])
def test_unknown_huge_page_size(make: Callable[..., Region], size: int) -> None:
    with no_trace(), pytest.raises(ValueError):
        make(1 << 30, huge_page_size=size)


@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd], ids=["anonymous", "memfd"])
def test_length_in_huge_pages(make: Callable[..., Region]) -> None:
    with no_trace(), pytest.raises(ValueError):
        make(HUGE_PAGE + PAGE, huge_page_size=HUGE_PAGE)


@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd], ids=["anonymous", "memfd"])
def test_too_few_huge_pages(make: Callable[..., Region]) -> None:
    needed = free_hugepages() + 1000
    with no_trace(), pytest.raises(UffdOSError) as caught:
        make(needed * HUGE_PAGE, huge_page_size=HUGE_PAGE)
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.data["needed_pages"] == needed
    assert caught.value.data["page_size"] == HUGE_PAGE
    assert "vm.nr_hugepages=" in caught.value.hint


def test_more_than_the_address_space() -> None:
    with no_trace():
        for make in (Region.anonymous, Region.memfd):
            with pytest.raises(ValueError):
                make(1 << 62)


@needs_hugepages(2)
def test_huge_anonymous_is_really_huge() -> None:
    with Region.anonymous(2 * HUGE_PAGE, huge_page_size=HUGE_PAGE) as region:
        region.fill(1)
        with Region.at(region.start, region.length) as found:
            assert found.page_size == HUGE_PAGE
            assert not found.shared


@needs_hugepages(1, size=1 << 30)
def test_one_gigabyte_pages() -> None:
    with Region.memfd(1 << 30, huge_page_size=1 << 30) as region:
        region.write((1 << 30) - 1, b"\1")
        assert region.page_size == 1 << 30
        with Region.at(region.start, region.length) as found:
            assert found.page_size == 1 << 30


# memfd


def test_seal_fixes_the_size() -> None:
    with Region.memfd(PAGE, seal=True) as region:
        assert region.fd is not None
        for size in (0, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        region.write(0, b"x")
        region.punch_hole()
        assert region.read(0, 1) == b"\0"


def test_private_memfd_leaves_the_file_alone() -> None:
    with Region.memfd(PAGE, shared=False) as region:
        assert region.fd is not None
        region.write(0, b"private")
        assert os.pread(region.fd, 7, 0) == bytes(7)


def test_descriptors_are_not_inherited(file: Path) -> None:
    with Region.memfd(PAGE) as memfd, Region.file(file) as mapped, memfd.alias() as alias:
        for region in (memfd, mapped, alias):
            assert region.fd is not None
            assert not os.get_inheritable(region.fd)


@pytest.mark.parametrize("huge", [pytest.param(True, marks=needs_hugepages(2)), False])
def test_received_memfd(huge: bool) -> None:
    page = HUGE_PAGE if huge else PAGE
    ours, theirs = socket.socketpair()
    with ours, theirs, Region.memfd(2 * page, huge_page_size=page if huge else None) as region:
        assert region.fd is not None
        region.write(page, b"sent")
        socket.send_fds(ours, [b"x"], [region.fd])
        (fd,) = socket.recv_fds(theirs, 1, 1)[1]
        with Region.file(fd, page, offset=page) as received:
            os.close(fd)
            assert received.kind is RegionKind.MEMFD
            assert received.page_size == page
            assert received.offset == page
            assert received.read(0, 4) == b"sent"
            received.write(0, b"back")
            with received.alias() as alias:
                assert alias.read(0, 4) == b"back"
        assert region.read(page, 4) == b"back"


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, 0x10], ids=["WRITE", "FUTURE_WRITE"])
def test_write_sealed_memfd(seal: int) -> None:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
        with no_trace(), pytest.raises(UffdPermissionError) as caught:
            Region.file(fd)
        assert caught.value.errno == errno.EACCES
        with Region.file(fd, shared=False) as private:
            private.write(0, b"own copy")
        if seal != fcntl.F_SEAL_WRITE:
            with Region.file(fd, writable=False) as shared, shared.alias() as alias:
                assert not alias.writable
    finally:
        os.close(fd)


# Files


def test_file_by_path_descriptor_and_object(file: Path) -> None:
    with file.open("r+b") as opened:
        for given in (file, str(file), opened, opened.fileno()):
            with Region.file(given) as region:
                assert region.kind is RegionKind.FILE
                assert region.length == 4 * PAGE
                assert region.page_size == PAGE
                assert region.read(0, 4) == b"file"
                region.write(PAGE, b"new")
            with Region.file(given, PAGE, offset=PAGE) as part:
                assert part.offset == PAGE
                assert part.read(0, 3) == b"new"
        assert os.fstat(opened.fileno()).st_size == 4 * PAGE


def test_private_file(file: Path) -> None:
    with file.open("rb") as opened, Region.file(opened, shared=False) as region:
        region.write(0, b"mine")
        assert file.read_bytes()[:4] == b"file"
        region.punch_hole(0, PAGE)
        assert region.read(0, 4) == b"file"
        with pytest.raises(ValueError):
            region.alias()


def test_read_only_file(file: Path) -> None:
    with file.open("rb") as opened:
        with no_trace(), pytest.raises(UffdPermissionError) as caught:
            Region.file(opened)
        assert caught.value.errno == errno.EACCES
        with Region.file(opened, writable=False) as region:
            assert not region.writable
            assert region.read(0, 4) == b"file"
            region.touch()
            refused: list[Callable[[], None]] = [
                lambda: region.write(0, b"x"),
                lambda: region.fill(1),
                lambda: region.touch(write=True),
                region.punch_hole,
            ]
            for call in refused:
                with pytest.raises(ValueError):
                    call()
            with region.alias() as alias:
                assert not alias.writable


def test_alias_of_a_read_only_mapping_is_writable_if_the_file_is(file: Path) -> None:
    with file.open("r+b") as opened, Region.file(opened, writable=False) as region:
        with region.alias() as alias:
            alias.write(0, b"FILE")
        assert region.read(0, 4) == b"FILE"


def test_write_only_file(file: Path) -> None:
    fd = os.open(file, os.O_WRONLY)
    try:
        with no_trace(), pytest.raises(UffdPermissionError):
            Region.file(fd)
    finally:
        os.close(fd)


def test_userfaultfd_refuses_shared_read_only_descriptors() -> None:
    with Region.memfd(PAGE) as memfd, Userfaultfd() as uffd:
        fd = os.open(f"/proc/self/fd/{memfd.fd}", os.O_RDONLY)
        try:
            with Region.file(fd, writable=False) as region:
                with pytest.raises(UffdPermissionError) as caught:
                    uffd.register(region)
                assert caught.value.errno == errno.EPERM
            with Region.file(fd, shared=False) as region:
                uffd.register(region)
        finally:
            os.close(fd)


@pytest.mark.parametrize(("offset", "length"), [(0, 5 * PAGE), (4 * PAGE, PAGE), (PAGE, 1 << 40)])
def test_file_shorter_than_the_region(file: Path, offset: int, length: int) -> None:
    with no_trace(), pytest.raises(ValueError):
        Region.file(file, length, offset=offset)


@pytest.mark.parametrize("offset", [1, -PAGE, 4 * PAGE, 5 * PAGE, 1 << 64])
def test_bad_file_offset(file: Path, offset: int) -> None:
    with no_trace(), pytest.raises(ValueError):
        Region.file(file, offset=offset)


def test_not_a_regular_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        with no_trace():
            for given in (reader, "/dev/zero"):
                with pytest.raises(ValueError):
                    Region.file(given, PAGE)
            with pytest.raises(IsADirectoryError):
                Region.file(tmp_path, PAGE)
            with pytest.raises(FileNotFoundError):
                Region.file(tmp_path / "none", PAGE)
    finally:
        os.close(reader)
        os.close(writer)
    with pytest.raises(OSError):
        Region.file(reader, PAGE)


@needs_privilege()
def test_full_tmpfs() -> None:
    with mounted("tmpfs", size="64k") as folder:
        path = Path(folder, "tmpfs-file")
        path.touch()
        os.truncate(path, 32 * PAGE)
        for shared in (True, False):
            with no_trace(), pytest.raises(UffdOSError) as caught:
                Region.file(path, shared=shared)
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.data == {"needed": 32 * PAGE, "free": 16 * PAGE}
        with Region.file(path, 16 * PAGE) as region:
            region.fill(1)
        with no_trace(), pytest.raises(UffdOSError) as caught:
            Region.file(path, 32 * PAGE, reserve=True)
        assert caught.value.errno == errno.ENOSPC
        with Region.file(path, 16 * PAGE) as region:  # what it has already needs no space
            assert region.read(0, 1) == b"\1"


@needs_privilege()
def test_reserve_takes_the_space_now() -> None:
    with mounted("tmpfs", size="64k") as folder:
        first, second = Path(folder, "tmpfs-file-1"), Path(folder, "tmpfs-file-2")
        for path in (first, second):
            path.touch()
            os.truncate(path, 16 * PAGE)
        with Region.file(first, reserve=True) as region:
            with no_trace(), pytest.raises(UffdOSError) as caught:
                Region.file(second)
            assert caught.value.errno == errno.ENOSPC
            region.fill(1)


# POSIX shared memory


def test_shm_is_created_and_opened() -> None:
    with Region.shm(NAME, 2 * PAGE) as first:
        assert first.kind is RegionKind.SHM
        assert SHM_FILE.stat().st_size == 2 * PAGE
        assert SHM_FILE.stat().st_mode & 0o777 == 0o600
        with Region.shm(NAME[1:], PAGE) as second, first.alias() as alias:
            second.write(0, b"shm")
            assert first.read(0, 3) == b"shm"
            assert alias.read(0, 3) == b"shm"
    assert SHM_FILE.exists()


def test_shm_unlink() -> None:
    with Region.shm(NAME, PAGE, unlink=True):
        assert SHM_FILE.exists()
    assert not SHM_FILE.exists()
    region = Region.shm(NAME, PAGE, unlink=True)
    SHM_FILE.unlink()
    region.close()
    region = Region.shm(NAME, PAGE, unlink=True)
    SHM_FILE.unlink()
    SHM_FILE.write_bytes(b"another's")
    region.close()
    assert SHM_FILE.exists()


def test_shm_shorter_than_asked() -> None:
    with Region.shm(NAME, PAGE):
        with no_trace(), pytest.raises(ValueError):
            Region.shm(NAME, 2 * PAGE)
        assert SHM_FILE.stat().st_size == PAGE


def test_shm_created_but_not_yet_sized_by_another() -> None:
    SHM_FILE.touch()
    with Region.shm(NAME, PAGE) as region:
        region.fill(1)


@pytest.mark.parametrize("name", ["", "/", "a/b", "..", "/.", "a\0b", "x" * 256])
def test_shm_bad_names(name: str) -> None:
    with no_trace(), pytest.raises(ValueError):
        Region.shm(name, PAGE)


def test_shm_too_large_for_the_file_system() -> None:
    space = os.statvfs("/dev/shm")
    length = space.f_blocks * space.f_frsize + (1 << 30)
    for reserve in (False, True):
        with no_trace(), pytest.raises(UffdOSError) as caught:
            Region.shm(NAME, length, reserve=reserve)
        assert caught.value.errno == errno.ENOSPC
        assert not SHM_FILE.exists()


def test_shm_does_not_follow_links(tmp_path: Path) -> None:
    SHM_FILE.symlink_to(tmp_path / "target")
    with no_trace(), pytest.raises(OSError) as caught:
        Region.shm(NAME, PAGE)
    assert caught.value.errno == errno.ELOOP


# hugetlbfs


@needs_privilege()
@needs_hugepages(4)
def test_hugetlbfs_file() -> None:
    with mounted("hugetlbfs", pagesize="2M") as folder:
        path = Path(folder, "huge-file")
        with Region.hugetlbfs(path, 2 * HUGE_PAGE) as region:
            assert region.kind is RegionKind.HUGETLBFS
            assert region.page_size == HUGE_PAGE
            region.write(HUGE_PAGE, b"huge")
            with region.alias() as alias:
                assert alias.read(HUGE_PAGE, 4) == b"huge"
            with Region.hugetlbfs(path, HUGE_PAGE, shared=False) as private:
                private.write(0, b"own")
                assert region.read(0, 3) == bytes(3)
            with Region.file(path) as again:
                assert again.kind is RegionKind.HUGETLBFS
                assert again.read(HUGE_PAGE, 4) == b"huge"
            with no_trace():
                with pytest.raises(ValueError):
                    Region.hugetlbfs(path, 3 * HUGE_PAGE)
                with pytest.raises(ValueError):
                    Region.file(path, HUGE_PAGE + PAGE)
        assert path.exists()
        Region.hugetlbfs(path, HUGE_PAGE, unlink=True).close()
        assert not path.exists()


@needs_privilege()
def test_hugetlbfs_errors_leave_no_file() -> None:
    with mounted("hugetlbfs", pagesize="2M") as folder:
        path = Path(folder, "huge-file")
        for length in (PAGE, HUGE_PAGE + PAGE, 0, -HUGE_PAGE):
            with no_trace(), pytest.raises(ValueError):
                Region.hugetlbfs(path, length)
            assert not path.exists()
        with no_trace(), pytest.raises(UffdOSError) as caught:
            Region.hugetlbfs(path, (free_hugepages() + 1000) * HUGE_PAGE)
        assert caught.value.errno == errno.ENOMEM
        assert not path.exists()


@needs_privilege()
@needs_hugepages(2)
def test_hugetlbfs_mount_with_a_limit() -> None:
    with mounted("hugetlbfs", pagesize="2M", size="2M") as folder:
        path = Path(folder, "huge-file")
        with no_trace(), pytest.raises(UffdOSError) as caught:
            Region.hugetlbfs(path, 2 * HUGE_PAGE)
        assert caught.value.errno == errno.ENOMEM
        assert "larger size=" in caught.value.hint
        Region.hugetlbfs(path, HUGE_PAGE).close()


def test_hugetlbfs_on_another_file_system(tmp_path: Path) -> None:
    with no_trace(), pytest.raises(ValueError):
        Region.hugetlbfs(tmp_path / "new", HUGE_PAGE)
    assert not (tmp_path / "new").exists()


# Memory of other code


@pytest.mark.parametrize("page_size", [None, PAGE])
def test_at(page_size: int | None) -> None:
    with Region.memfd(4 * PAGE) as region:
        region.write(PAGE, b"found")
        with Region.at(region.start + PAGE, 2 * PAGE, page_size) as found:
            assert found.kind is RegionKind.ADDRESS
            assert (found.start, found.length) == (region.start + PAGE, 2 * PAGE)
            assert found.page_size == PAGE
            assert found.shared
            assert found.offset == PAGE
            assert found.fd is None
            assert found.read(0, 5) == b"found"
            with pytest.raises(ValueError):
                found.alias()
        assert region.read(PAGE, 5) == b"found"


def test_at_does_not_warn_or_unmap_when_forgotten() -> None:
    with Region.anonymous(PAGE) as region:
        region.write(0, b"x")
        Region.at(region.start, PAGE)
        assert region.read(0, 1) == b"x"


def test_at_read_only_memory() -> None:
    fd = os.memfd_create("read-only", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE)
        with Region.file(fd, writable=False) as region, Region.at(region.start, PAGE) as found:
            assert not found.writable
    finally:
        os.close(fd)


def test_at_over_several_mappings_of_one_kind() -> None:
    with Region.anonymous(4 * PAGE) as region:
        region.madvise(mmap.MADV_DONTFORK, PAGE, PAGE)  # splits the mapping in three
        with Region.at(region.start, 4 * PAGE) as found:
            assert found.length == 4 * PAGE


@pytest.mark.parametrize("page_size", [None, PAGE])
def test_at_nothing(page_size: int | None) -> None:
    with Region.anonymous(64 * PAGE) as region:
        start = region.start
    with pytest.raises(ValueError):
        Region.at(start, 64 * PAGE, page_size)


@pytest.mark.parametrize(
    ("shift", "length", "page_size"),
    [
        (1, PAGE, None),
        (0, PAGE + 1, None),
        (0, 0, None),
        (0, -PAGE, None),
        (0, 1 << 63, None),
        (0, PAGE, 1234),
        (PAGE, HUGE_PAGE, HUGE_PAGE),
    ],
)
def test_at_bad_arguments(shift: int, length: int, page_size: int | None) -> None:
    with Region.anonymous(4 * HUGE_PAGE) as region, pytest.raises(ValueError):
        Region.at(region.start + shift, length, page_size)


@needs_hugepages(1)
def test_at_huge_pages_needs_huge_alignment() -> None:
    with Region.memfd(HUGE_PAGE, huge_page_size=HUGE_PAGE) as region, pytest.raises(ValueError):
        Region.at(region.start + PAGE, PAGE)
