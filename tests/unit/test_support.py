"""The test infrastructure itself: children with budgets, needs, strict mode."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pyuffd import Region
from pyuffd.testing import require
from pyuffd.testing._need import Need
from pyuffd.testing._needs import marked
from pyuffd.testing._run import ChildFailure, wait_for_end
from pyuffd.testing._skips import lack_of
from tests._child import ROOT, limit_s, run_child
from tests._zygote import ends_by_itself

# Longer than every budget used here, so that only the time limit ends it.
FOREVER_S = 600


def add(first: int, second: int) -> int:
    print("adding")
    return first + second


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def hold_the_gil() -> None:
    # One C call that keeps every other Python thread from running.
    sum(iter(int, 1))


def leave_a_grandchild() -> int:
    return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER_S})"]).pid


def skip_here() -> None:
    pytest.skip("said the child")


class Last:
    """Says when it is freed."""

    def __del__(self) -> None:
        print("freed")


left: list[object] = []


def leave_an_object() -> None:
    left.append(Last())


def leave_an_exit_function() -> None:
    atexit.register(print, "at the end")


def leave_plain_objects() -> None:
    """None of them makes the end of the interpreter a part of the test."""
    left.extend([Path(), threading.Lock(), iter(()), {"a": 1}])


def leave_a_thread() -> None:
    threading.Thread(target=lambda: print("thread", flush=True)).start()


def test_function_by_reference_returns_value_and_output() -> None:
    result = run_child(add, 2, second=3)
    assert (result.value, result.stdout, result.returncode) == (5, "adding\n", 0)


def test_function_by_dotted_name() -> None:
    assert run_child("tests.unit.test_support:add", 20, 22).value == 42


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (leave_an_object, "freed\n"),
        (leave_an_exit_function, "at the end\n"),
        (leave_a_thread, "thread\n"),
        (leave_plain_objects, ""),
    ],
)
def test_the_end_of_a_child_does_what_is_left(leave: Callable[[], None], said: str) -> None:
    result = run_child(leave)
    assert (result.returncode, result.stdout, result.stderr) == (0, said, "")


def test_what_the_end_of_an_interpreter_is_needed_for() -> None:
    generator = (thing for thing in left)
    with Region.anonymous(4096) as region, open("/dev/null") as file:
        assert all(map(ends_by_itself, [region, file, generator, Last()]))
    leave_plain_objects()
    try:
        assert not any(map(ends_by_itself, left))
    finally:
        left.clear()


def test_source_text() -> None:
    result = run_child("import sys\nprint('text', file=sys.stderr)\nsys.exit(7)", expect=7)
    assert result.stderr == "text\n"


def test_unexpected_end_reports_output() -> None:
    with pytest.raises(ChildFailure) as caught:
        run_child("print('before')\nraise LookupError('reason')")
    assert caught.value.result.returncode == 1
    assert "LookupError: reason" in str(caught.value)
    assert "before" in str(caught.value)


def test_signal_is_named() -> None:
    result = run_child(die, int(signal.SIGBUS), expect=-signal.SIGBUS)
    assert result.signal is signal.SIGBUS


def test_budget_ends_a_child_that_holds_the_gil() -> None:
    result = run_child(hold_the_gil, budget_s=0.3, expect="timeout")
    assert "hold_the_gil" in result.stderr


def test_running_out_of_time_is_a_failure_unless_expected() -> None:
    with pytest.raises(ChildFailure):
        run_child(hold_the_gil, budget_s=0.3)


def test_grandchildren_do_not_outlive_the_child() -> None:
    assert wait_for_end(run_child(leave_a_grandchild).value, timeout_s=10)


def test_skip_in_a_child_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="said the child"):
        run_child(skip_here)


def lack_a_moon() -> None:
    require(marked(Need("a moon", lambda: (["moon"], "the sky is empty"))))


def test_need_of_a_child_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYUFFD_TESTS_MAY_LACK", "moon")
    with pytest.raises(pytest.skip.Exception) as caught:
        run_child(lack_a_moon)
    lack = lack_of(caught.value)
    assert lack is not None
    assert (lack.keys, lack.may_be) == (["moon"], True)


def test_unmet_need_names_what_was_found() -> None:
    need = Need("a moon", lambda: (["moon"], "the sky is empty"))
    with pytest.raises(pytest.skip.Exception, match="needs a moon; the sky is empty"):
        require(marked(need))


def test_met_need_lets_the_test_run() -> None:
    require(marked(Need("air", lambda: ([], "air"))))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite with the real conftest's hooks and one test of each kind of skip."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_skips.py").write_text(
        textwrap.dedent(
            """
            import pytest
            from pyuffd.testing._need import Need
            from pyuffd.testing._needs import marked

            MOON = marked(Need("a moon", lambda: (["moon"], "no moon")))

            @MOON
            def test_marked(): ...

            @pytest.mark.parametrize("n", [1, pytest.param(2, marks=MOON)])
            def test_parametrised(n): ...

            def test_plain(): pytest.skip("tired")
            """
        )
    )
    return tmp_path


def run_suite(folder: Path, *args: str, **env: str) -> tuple[int, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PY")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)),
            *("--confcutdir", str(folder), *args, str(folder)),
        ],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=limit_s(300),
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_skips_are_counted_by_reason(suite: Path, workers: tuple[str, ...]) -> None:
    status, output = run_suite(suite, *workers)
    assert status == 0, output
    assert "2 needs a moon; no moon" in output
    assert "1 tired" in output
    assert "1 passed, 3 skipped" in output


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_require_turns_skips_into_failures(suite: Path, workers: tuple[str, ...]) -> None:
    status, output = run_suite(suite, *workers, PYUFFD_TESTS="require")
    assert status == 1, output
    assert "1 failed, 1 passed, 2 errors" in output


def test_require_lets_named_needs_be_lacking(suite: Path) -> None:
    status, output = run_suite(suite, PYUFFD_TESTS="require", PYUFFD_TESTS_MAY_LACK="moon")
    assert status == 1, output
    assert "1 failed, 1 passed, 2 skipped" in output
