"""The parts of the conformance suite: table of cases, reports, the kernel's log, commands."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pyuffd import Feature, Region, RegisterMode
from pyuffd.cli import main
from pyuffd.conformance import (
    Case,
    Report,
    Result,
    Variant,
    _selftests,
    case,
    compare,
    load,
    markdown,
    write_report,
)
from pyuffd.conformance import _case as case_module
from pyuffd.conformance._context import letters, show
from pyuffd.conformance._kmsg import parse
from pyuffd.conformance._report import FAILED, PASSED, SKIPPED, Message
from pyuffd.conformance._wording import alternatives, places
from pyuffd.conformance.cases.masks import wanted
from pyuffd.testing._memory_types import MEMORY_TYPES

DOCS = Path(__file__).resolve().parents[2] / "docs"
CASES = load()


def report(**outcomes: str) -> Report:
    """Make a report with one result for each keyword, CASE__MEMORY=outcome."""
    made = Report({"release": "1.2.3", "version": "#1", "machine": "x86_64"}, 0x3)
    for key, outcome in outcomes.items():
        name, memory = key.split("__")
        made.results[f"a.{name}.{memory}"] = Result(
            f"a.{name}.{memory}", f"a.{name}", memory, f"does {name}", outcome, f"<{outcome} text>"
        )
    return made


def test_page_is_in_step_with_the_cases() -> None:
    assert (DOCS / "generated" / "conformance.md").read_text() == markdown(CASES)


def test_ids_are_unique_and_name_a_memory_type() -> None:
    ids = [name for case_ in CASES.values() for name in case_.ids]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[\w-]+(\.[\w-]+)+", name, re.ASCII) for name in ids)


@pytest.mark.parametrize("name", CASES)
def test_case_says_what_and_where_from(name: str) -> None:
    case_ = CASES[name]
    assert case_.summary
    assert case_.summary == case_.summary.strip().rstrip(".")
    assert "\n" not in case_.summary
    assert case_.origin
    assert case_.memory


@pytest.mark.parametrize("name", ["nodots", "a..b", "a.b c", next(iter(CASES))])
def test_bad_or_known_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        case(name, origin="here")(lambda _: None)


def test_case_without_a_summary_is_refused() -> None:
    with pytest.raises(ValueError):
        case("a.b", origin="here")(lambda _: None)


def test_noisy_case_runs_alone() -> None:
    with pytest.raises(ValueError):
        case("a.b", origin="here", summary="x", noisy=True)(lambda _: None)


@pytest.mark.parametrize(
    ("ids", "count"),
    [
        (_selftests.unit_tests(), 114),
        (_selftests.wp_mremap(), 38),
        (_selftests.stress(), 5),
        (_selftests.pagemap_ioctl(), 119),
    ],
)
def test_every_result_of_the_selftests_has_an_id_of_its_own(ids: list[str], count: int) -> None:
    assert len(ids) == count
    assert len(set(ids)) == count
    assert set(ids) <= {name for case_ in CASES.values() for name in case_.ids}


@pytest.mark.parametrize(
    ("memory", "masks"),
    [
        ("anon", [0x13C, 0x17C, 0x17C, None, None, None, None]),
        ("shmem", [0x13C, 0x17C, 0x17C, 0x1BC, 0x1BC, 0x1FC, 0x1FC]),
        ("shmem-private", [0x13C, 0x17C, 0x17C, 0x1BC, 0x1BC, 0x1FC, 0x1FC]),
        ("hugetlb", [0x10C, 0x14C, 0x14C, 0x18C, 0x18C, 0x1CC, 0x1CC]),
        ("hugetlb-private", [0x10C, 0x14C, 0x14C, 0x18C, 0x18C, 0x1CC, 0x1CC]),
    ],
)
def test_masks_of_linux_6_18(memory: str, masks: list[int | None]) -> None:
    made = [wanted(MEMORY_TYPES[memory], RegisterMode(bits), 0x1FFFF) for bits in range(8)]
    assert made == [None, *masks]


def test_masks_follow_the_features() -> None:
    memory, mode = MEMORY_TYPES["shmem"], RegisterMode.MISSING | RegisterMode.WP
    everything = 0x1FFFF
    assert wanted(memory, mode, everything & ~Feature.POISON) == 0x07C
    assert wanted(memory, mode, everything & ~Feature.MOVE) == 0x15C
    assert wanted(memory, mode, everything & ~Feature.WP_HUGETLBFS_SHMEM) is None


def test_message_names_the_first_few_cases() -> None:
    assert Message("x", 4, False, ["a.b.anon"]).when == "while a.b.anon ran"
    many = [f"a.b{number}.anon" for number in range(5)]
    when = "while a.b0.anon and a.b1.anon and a.b2.anon and 2 more ran"
    assert Message("x", 4, False, many).when == when
    assert Message("x", 4, True, []).when == "between cases"


def test_decorator_fills_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, Case] = {}
    monkeypatch.setattr(case_module, "_cases", table)

    @case("a.b", origin="here", memory=("anon", "hugetlb"), features=Feature.MOVE)
    def run(_: object) -> None:
        """Move it.

        Further text.
        """

    assert table["a.b"].summary == "Move it"
    assert table["a.b"].ids == ["a.b.anon", "a.b.hugetlb"]
    assert "| `a.b` | Move it | anon, hugetlb | MOVE | here |" in markdown(table)


def test_variant_is_possible_only_where_the_mask_agrees() -> None:
    variant = Variant("new", "text", features=Feature.MOVE, lacks=Feature.RWP)
    assert variant.possible(Feature.MOVE)
    assert not variant.possible(0)
    assert not variant.possible(Feature.MOVE | Feature.RWP)


@pytest.mark.parametrize(
    ("bits", "text"), [(0, "-----"), (1 << 63 | 1 << 61 | 1 << 57, "P-FW-"), (3 << 56, "---WX")]
)
def test_letters(bits: int, text: str) -> None:
    assert letters(bits) == text


def test_show_names_the_errno() -> None:
    assert show(FileExistsError(17, "x")) == "EEXIST (FileExistsError)"


@pytest.mark.parametrize(
    ("raw", "is_warning", "is_fatal"),
    [
        ("6,1,10,-;usb 1-1: new device", False, False),
        ("4,2,10,-;WARNING: CPU: 1 PID: 2 at mm/memory.c:1 f+0x1/0x2\n SUBSYSTEM=x", True, True),
        ("12,3,10,-;WARNING: from user space, level 4", False, False),
        ("1,4,10,-;BUG: unable to handle page fault for address: 0", True, True),
        ("6,5,10,-;INFO: task x:1 blocked for more than 120 seconds.", True, True),
    ],
)
def test_kernel_log_records(raw: str, is_warning: bool, is_fatal: bool) -> None:
    record = parse(raw)
    assert (record.is_warning, record.is_fatal) == (is_warning, is_fatal)
    assert "\n" not in record.text


def test_report_survives_json(tmp_path: Path) -> None:
    made = report(x__anon=PASSED, x__shmem=FAILED, y__anon=SKIPPED)
    made.messages.append(Message("WARNING: here", 4, True, ["a.x.anon"]))
    for named in ("r", "r.json", "r.html"):
        paths = write_report(made, tmp_path / named)
        assert paths == [tmp_path / "r.json", tmp_path / "r.html"]
    assert Report.read(tmp_path / "r.json") == made


def test_text_has_a_row_for_each_case_and_counts() -> None:
    made = report(x__anon=PASSED, x__shmem=FAILED, y__anon=SKIPPED)
    lines = list(made.lines())
    assert lines[0].split() == ["anon", "shmem"]
    assert lines[1].split() == ["a.x", "pass", "FAIL"]
    assert lines[2].split() == ["a.y", "skip", "."]
    assert "skipped 1: <skipped text>" in lines
    assert lines[-1].startswith("1 passed, 1 failed, 1 skipped on Linux 1.2.3")


def test_html_is_well_formed_and_escapes(tmp_path: Path) -> None:
    open_tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "br", "input"):
                open_tags.append(tag)
            assert "src" not in dict(attrs)
            if href := dict(attrs).get("href"):
                links.append(href)
            if name := dict(attrs).get("id"):
                targets.append(f"#{name}")

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    links: list[str] = []
    targets: list[str] = []
    write_report(report(x__anon=FAILED, x__shmem=PASSED, y__anon=SKIPPED), tmp_path / "r")
    text = (tmp_path / "r.html").read_text()
    Parser().feed(text)
    assert open_tags == []
    # A red cell of the overview and a failure's heading lead to the row, the row's to the failure.
    assert sorted(links) == ["#a.x.anon", "#group-a", "#row-a.x", "#row-a.x"]
    assert set(links) <= set(targets)
    assert len(set(targets)) == len(targets)
    assert "1 passed, 1 failed, 1 skipped" in text
    assert text.index("&lt;skipped text&gt;") < text.index("&lt;failed text&gt;")
    assert "<failed text>" not in text
    assert "&lt;failed text&gt;" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError):
        Report.read(tmp_path / "r.json")


def test_compare_names_what_changed() -> None:
    before = report(x__anon=PASSED, y__anon=PASSED)
    after = report(x__anon=FAILED, y__anon=PASSED, z__anon=PASSED)
    found = [(item.id, item.before, item.after) for item in compare(before, after)]
    assert found == [("a.x.anon", "pass", "FAIL"), ("a.z.anon", "absent", "pass")]


@pytest.mark.parametrize(("outcome", "status"), [(PASSED, 0), (FAILED, 1)])
def test_diff_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], outcome: str, status: int
) -> None:
    write_report(report(x__anon=PASSED), tmp_path / "a")
    write_report(report(x__anon=outcome), tmp_path / "b")
    for suffix in (".json", ""):
        arguments = [str(tmp_path / f"{name}{suffix}") for name in "ab"]
        assert main(["conformance", "diff", *arguments]) == status
        printed = capsys.readouterr().out
        assert ("a.x.anon: pass -> FAIL" in printed) == (status == 1)
        assert ("no results differ, of 1" in printed) == (status == 0)


def test_diff_command_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("no report")
    assert main(["conformance", "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "a.json is not a conformance report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["wp-series"], "pass -k 'wp-series'"), (["--report", "/no/such/file"], "no such folder")],
)
def test_run_command_says_what_is_wrong(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", "run", *arguments]) == 2
    assert hint in capsys.readouterr().err


def test_list_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [name for case_ in CASES.values() for name in case_.ids]


def test_what_tests_bring_about_is_counted_and_the_rest_stands_out() -> None:
    made = report(x__anon=PASSED)
    made.messages += [
        Message("mce: MCE: Killing python:7 due to hardware memory corruption", 3, False, ["a"]),
        Message("Memory failure: 0x5: already hardware poisoned", 3, False, ["a"]),
        Message("EXT4-fs: something else", 4, False, ["a"]),
        Message("WARNING: CPU: 0 PID: 1 at mm/memory-failure.c:1", 4, True, ["a"]),
    ]
    lines = list(made.lines())[-3:]
    assert lines[0].startswith("kernel BROKEN: WARNING")
    assert lines[1].startswith("the kernel's log, not counted: EXT4-fs")
    assert lines[2].endswith("2 about memory errors that poison simulates")


def test_addresses_are_pages_of_regions() -> None:
    with Region.anonymous(3 * 4096) as one, Region.anonymous(4096) as two:
        text = (
            f"at {one.start + 4096:#x}, {one.start + 5:#x}, {two.start:#x}, 0x123, 0x7fffdeadb000"
        )
        assert places(text, [one]).startswith("at page 1, byte 0x5 of page 0, ")
        assert "page 1 of region 0, byte 0x5 of page 0 of region 0, page 0 of region 1" in (
            places(text, [one, two])
        )
        assert places(text, [one]).endswith("0x123, 0x7fffdeadb000")


def test_alternatives_are_named_by_value() -> None:
    assert alternatives({"usual": "0", "old": "0", "refused": "22"}) == (
        "0 (usual, old) or 22 (refused)"
    )
