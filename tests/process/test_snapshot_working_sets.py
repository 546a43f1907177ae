"""Working sets of a snapshot: recorded, kept beside it, shown, and never content."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyuffd
from pyuffd import Process, Snapshot, SnapshotRegion
from pyuffd.cli import main
from pyuffd.testing import needs_privilege
from tests._memory import PAGE

pytestmark = needs_privilege("CAP_SYS_PTRACE")

# 256 pages, each with another first byte than its neighbours.
TARGET = """
import mmap, sys
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(256):
    memory[page * 4096] = page % 255 + 1
print(flush=True)
input()
"""


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a snapshot; a test that changes it copies it."""
    path = tmp_path_factory.mktemp("snapshots") / "one"
    child = subprocess.Popen(
        [sys.executable, "-c", TARGET], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    with Process(child.pid) as target:
        Snapshot.take(target, path, method="stopped", durable=False)
    child.communicate()
    return path


@pytest.fixture
def snapshot(taken: Path, tmp_path: Path) -> Iterator[Snapshot]:
    """Return a copy of it, at the start of the test's folder."""
    path = tmp_path / "one"
    subprocess.run(["cp", "-r", "--sparse=always", taken, path], check=True)
    with Snapshot.open(path) as snapshot:
        yield snapshot


def area(snapshot: Snapshot) -> tuple[int, SnapshotRegion]:
    """Return where in the image the 256 pages are, and their mapping."""
    offset = 0
    for region in snapshot.regions:
        for at in range(region.start, region.end - (1 << 20) + 1, PAGE):
            if region.kind != "anonymous" or region.permissions != "rw-p":
                break
            state = snapshot.state(at)
            if state is None or state.value != "data":
                continue
            if snapshot.read(at, 1) == b"\1" and snapshot.read(at + 200 * PAGE, 1) == b"\xc9":
                return offset + at - region.start, SnapshotRegion(
                    at, 1 << 20, "rw-p", region.kind, "", 0, 0, 0, PAGE
                )
        offset += region.length
    raise AssertionError("not found")


def touched(snapshot: Snapshot, found: SnapshotRegion, pages: list[int], name: str) -> None:
    """Serve the area lazily, and record these pages."""
    with pyuffd.lazy(snapshot.read(found.start, found.length), fault_log=1000) as memory:
        for page in pages:
            assert memory.read(page * PAGE, 1) == snapshot.read(found.start + page * PAGE, 1)
        known = snapshot.record(name, memory.handler, [(memory, found.start)], until=0.1)
        assert known == snapshot.working_set(name)


def test_recorded_and_read(snapshot: Snapshot) -> None:
    offset, found = area(snapshot)
    assert snapshot.working_sets() == {}
    assert snapshot.working_set("startup") is None
    touched(snapshot, found, [9, 8, 200, 10, 11], "startup")
    touched(snapshot, found, [9, 50, 200], "startup")
    known = snapshot.working_sets()["startup"]
    assert known.recordings == 2
    assert [((r.offset - offset) // PAGE, r.length // PAGE, r.seen, r.tried) for r in known] == [
        (9, 1, 2, 2),
        (50, 1, 1, 2),
        (8, 1, 1, 2),
        (200, 1, 2, 2),
        (10, 2, 1, 2),
    ]
    # The snapshot itself is as it was.
    snapshot.verify()
    assert sorted(os.listdir(snapshot.path)) == [
        "manifest.json",
        "notes",
        "pages",
        "runs",
        "startup.working-set",
    ]
    assert snapshot.image_offset(found.start + 5) == offset + 5


def test_until_it_is_stopped(snapshot: Snapshot) -> None:
    """From another thread; what was touched by then is saved, and nothing is not."""
    _, found = area(snapshot)
    stop = threading.Event()
    with pyuffd.lazy(snapshot.read(found.start, found.length), fault_log=10) as memory:
        stop.set()
        known = snapshot.record(
            "none", memory.handler, [(memory, found.start)], until="settled", stop=stop
        )
        assert (len(known), known.recordings, known.problem) == (0, 0, "")
        assert snapshot.working_sets() == {}
        memory.read(PAGE, 1)
        known = snapshot.record(
            "one", memory.handler, [(memory, found.start)], until=600, stop=stop
        )
    assert known.length == PAGE


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a" * 65, "a\0", "ü", "a\n"])
def test_bad_names(name: str, snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match="name"):
        snapshot.working_set(name)
    with pyuffd.lazy(bytes(PAGE), fault_log=1) as memory, pytest.raises(ValueError, match="name"):
        snapshot.record(name, memory.handler, [(memory, 0)])


def test_bad_arguments(snapshot: Snapshot) -> None:
    start = snapshot.regions[0].start
    with pytest.raises(TypeError, match="name"):
        snapshot.working_set(5)  # type: ignore[arg-type]
    with pyuffd.lazy(bytes(PAGE)) as memory, pytest.raises(ValueError, match="fault_log"):
        snapshot.record("one", memory.handler, [(memory, start)], until=0)
    with pyuffd.lazy(bytes(PAGE), fault_log=1) as memory:
        for address, until in ((0, 1.0), (start + 1, 1.0), (start, "soon"), (start, -1.0)):
            with pytest.raises(ValueError):
                snapshot.record(
                    "one",
                    memory.handler,
                    [(memory, address)],
                    until=until,  # type: ignore[arg-type]
                )
    assert snapshot.working_sets() == {}
    with pytest.raises(LookupError):
        snapshot.image_offset(0)


def test_bad_files_are_named(
    snapshot: Snapshot, taken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By working_sets and by `pyuffd info`; a name that is no name is none of ours."""
    folder = Path(snapshot.path)
    _, found = area(snapshot)
    touched(snapshot, found, [3], "good")
    whole = (folder / "good.working-set").read_bytes()
    (folder / "cut.working-set").write_bytes(whole[:-1])
    (folder / "other.working-set").write_bytes(whole[:16] + b"0" * 32 + whole[48:])
    os.mkfifo(folder / "fifo.working-set")
    (folder / "link.working-set").symlink_to("good.working-set")
    (folder / ".tmp.working-set").write_bytes(whole)
    (folder / "x y.working-set").write_bytes(whole)
    sets = snapshot.working_sets()
    assert list(sets) == ["cut", "fifo", "good", "link", "other"]
    assert [name for name, known in sets.items() if not known.problem] == ["good"]
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "working set good: 0.00 MiB in 1 runs, recorded once" in out
    assert "working set link is not used: a symbolic link" in out
    assert "working set fifo is not used: not a regular file" in out
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["working_sets"]
    assert facts["good"] == {
        "recordings": 1,
        "runs": 1,
        "bytes": PAGE,
        "often_bytes": PAGE,
        "problem": "",
    }
    assert "truncated" in facts["cut"]["problem"]


def test_a_picture(snapshot: Snapshot, capsys: pytest.CaptureFixture[str]) -> None:
    # matplotlib keeps threads and files: it is not imported here.
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib")
    picture = str(Path(snapshot.path).parent / "hot.png")
    command = ["info", snapshot.path, "--png", picture]
    assert main(command) == 2
    assert "no working set to draw" in capsys.readouterr().err
    assert not os.path.exists(picture)
    _, found = area(snapshot)
    touched(snapshot, found, list(range(0, 256, 3)), "some")
    Path(snapshot.path, "bad.working-set").touch()
    assert main([*command, "--working-set", "bad"]) == 2
    assert "truncated" in capsys.readouterr().err
    subprocess.run([sys.executable, "-m", "pyuffd", *command], check=True, capture_output=True)
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_each_page_where_it_is() -> None:
    from pyuffd import WorkingSet
    from pyuffd._working_set import merged
    from pyuffd.cli import _hot_map

    regions = [
        SnapshotRegion(start, pages * PAGE, "rw-p", "anonymous", "", 0, 0, 0, PAGE)
        for start, pages in ((1 << 30, 10), (1 << 31, 300), (1 << 32, 700))
    ]
    known = merged(WorkingSet(bytes(32), 1010 * PAGE), [(600, 1), (8, 4), (0, 1), (309, 2)])
    found = list(_hot_map._mappings(regions, known))
    assert [(each.region.start, each.touched) for each in found] == [
        (1 << 30, [(8, 2, 1), (0, 1, 5)]),
        (1 << 31, [(0, 2, 3), (299, 1, 6)]),
        (1 << 32, [(290, 1, 0), (0, 1, 7)]),
    ]
    grid = found[1].grid(1)
    assert (len(grid), len(grid[0])) == (2, 256)
    marked = {
        (row, column): value
        for row, line in enumerate(grid)
        for column, value in enumerate(line)
        if value == value
    }
    assert marked == {(0, 0): 3 / 256, (0, 1): 4 / 256, (1, 43): 6 / 256}
    assert [value for value in found[1].grid(4)[0] if value == value] == [3 / 256, 6 / 256]


def test_a_flat_copy_has_the_working_sets(snapshot: Snapshot, tmp_path: Path) -> None:
    """The offsets mean the same pages, so only the id in the files differs."""
    start, region = area(snapshot)
    with pyuffd.lazy(snapshot.read(region.start, 1 << 20), fault_log=1000) as memory:
        for page in (7, 2, 200):
            memory.read(page * PAGE, 1)
        known = snapshot.record("startup", memory.handler, [(memory, region.start)], until=0.1)
    (tmp_path / "one" / "damaged.working-set").write_bytes(b"nothing of the kind")
    snapshot.flatten(tmp_path / "flat", durable=False)
    with Snapshot.open(tmp_path / "flat") as flat:
        (name,) = flat.working_sets()
        found = flat.working_set(name)
        assert (name, found.problem if found else None) == ("startup", "")
        assert found is not None
        assert list(found) == list(known)
        assert found[0].offset == start + 7 * PAGE
        assert found.image_id == flat.id.encode() != known.image_id
    assert sorted(os.listdir(tmp_path / "flat")) == sorted(
        ["manifest.json", "notes", "pages", "runs", "startup.working-set"]
    )
