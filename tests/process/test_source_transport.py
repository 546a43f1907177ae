"""How page sources are sent to the helper process: by name, by value, and the main module."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyuffd import CallableSource
from pyuffd.handlers.process import _transport
from pyuffd.testing._needs import needs_kernel_faults
from tests.process._scripts import How, run_program

pytestmark = needs_kernel_faults()

USE = """
from pyuffd import AsyncSource, CallableSource, Handler, Region, Userfaultfd

def use(*sources):
    with Userfaultfd() as uffd:
        with Handler(uffd, driver="process") as handler:
            handler.start()
            for source in sources:
                with Region.anonymous(8192) as region:
                    handler.serve(region, source)
                    with region.memoryview() as view:
                        print(view[0], view[4096])
"""
USED = "1 2\n"

FUNCTION = """
def page_number(offset):
    return offset // 4096 + 1

def function(offset, length):
    return bytes([page_number(offset)]) * length
"""

# Defined in the main module, with names.
NAMED = (
    FUNCTION
    + """
from dataclasses import dataclass
from enum import Enum
from functools import partial

class Pages:
    length = None
    def read(self, offset, length):
        return function(offset, length)
    def page(self, offset, length):
        return function(offset, length)

class Kind(Enum):
    ONE = 1

@dataclass
class Data:
    kind: Kind
    length: int | None = None
    def read(self, offset, length):
        assert self.kind is Kind.ONE
        return function(offset, length)

async def later(offset, length):
    return function(offset, length)

def third(extra, offset, length):
    return function(offset, length)

def named():
    yield CallableSource(function)
    yield CallableSource(Pages().page)
    yield Pages()
    yield Data(Kind.ONE)
    yield AsyncSource(later)
    yield CallableSource(partial(third, "extra"))
"""
)
NAMED_COUNT = 6

# These cannot be found by a name.
NAMELESS = """
def nameless():
    first = 1
    def page(offset, length):
        return bytes([first + offset // 4096]) * length
    async def page_later(offset, length):
        return page(offset, length)
    class Local:
        length = None
        def read(self, offset, length):
            return page(offset, length)
    yield CallableSource(lambda offset, length: page(offset, length))
    yield CallableSource(page)
    yield AsyncSource(page_later)
    yield Local()
"""
NAMELESS_COUNT = 4

GUARDED_USE = """
if __name__ == "__main__":
    use(CallableSource(function))
"""
UNGUARDED_USE = "\nuse(CallableSource(function))\n"


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])
def test_with_cloudpickle(guard: bool, tmp_path: Path) -> None:
    """The main module is not imported a second time."""
    program = USE + "print(__name__)\n" + NAMED + NAMELESS
    indent = "    " * guard
    program += '\nif __name__ == "__main__":\n' * guard
    program += f"{indent}use(*named(), *nameless())\n"
    done = run_program(tmp_path, program)
    expected = "__main__\n" + (NAMED_COUNT + NAMELESS_COUNT) * USED
    assert (done.stdout, done.stderr, done.returncode) == (expected, "", 0)


WITHOUT_CLOUDPICKLE = """
if __name__ == "__main__":
    use(*named())
    for source in nameless():
        try:
            use(source)
        except ValueError as error:
            print(error)
"""


def test_without_cloudpickle(tmp_path: Path) -> None:
    """Named objects work; for the others the error names cloudpickle."""
    program = USE + NAMED + NAMELESS + WITHOUT_CLOUDPICKLE
    done = run_program(tmp_path, program, cloudpickle=False)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.startswith(NAMED_COUNT * USED)
    said = done.stdout.removeprefix(NAMED_COUNT * USED).splitlines()
    assert len(said) == NAMELESS_COUNT
    for line in said:
        assert "pip install 'pyuffd[cloudpickle]'" in line
        assert "driver='thread'" in line


@pytest.mark.crossing
@pytest.mark.parametrize("how", ["file", "-c", "stdin", "-m", "folder"])
@pytest.mark.parametrize("cloudpickle", [True, False], ids=["cloudpickle", "none"])
def test_how_the_program_was_started(how: How, cloudpickle: bool, tmp_path: Path) -> None:
    program = USE + FUNCTION + GUARDED_USE
    done = run_program(tmp_path, program, how=how, cloudpickle=cloudpickle)
    if cloudpickle or how in ("file", "-m"):
        assert (done.stdout, done.stderr, done.returncode) == (USED, "", 0)
        return
    assert (done.stdout, done.returncode) == ("", 1)
    last = done.stderr.splitlines()[-1]
    assert "Install cloudpickle" in last
    assert "is not a file" in last


# The main module without a guard

CATCHING = """
try:
    use(CallableSource(function))
except {0}:
    {1}
"""
WITHOUT_GUARD = {
    "plain": UNGUARDED_USE,
    "in a function": "def main():\n    use(CallableSource(function))\nmain()\n",
    "by auto": UNGUARDED_USE.replace("use(", "use_auto("),
    "exceptions caught": CATCHING.format(
        "Exception as error", 'print("caught in", __name__); raise'
    ),
    "all caught": "import sys\n"
    + CATCHING.format("BaseException", "if __name__ == '__main__': raise"),
}


@pytest.mark.crossing(every=3)
@pytest.mark.parametrize("what", WITHOUT_GUARD)
def test_no_main_guard(what: str, tmp_path: Path) -> None:
    """The second run ends where it makes a Handler, and serve() says why."""
    how: How = "-m" if what == "plain" else "file"
    program = USE + USE.replace("def use(", "def use_auto(").replace(', driver="process"', "")
    program = program.replace("            handler.start()\n", "")
    program += "print('runs in', __name__)\n" + FUNCTION + WITHOUT_GUARD[what]
    done = run_program(tmp_path, program, how=how, cloudpickle=False, flags=["-u"])
    runs = "runs in __main__\nruns in __mp_main__\n"
    caught = "caught in __main__\n" if what == "exceptions caught" else ""
    assert (done.stdout, done.returncode) == (runs + caught, 1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: ")
    for part in ('`if __name__ == "__main__":`', "script.py, line ", "pyuffd[cloudpickle]"):
        assert part in last


def test_a_module_that_does_its_work_at_import(tmp_path: Path) -> None:
    """Otherwise each helper would start another one."""
    (tmp_path / "application.py").write_text(USE + FUNCTION + UNGUARDED_USE)
    done = run_program(tmp_path, "import application\n")
    assert (done.stdout, done.returncode) == ("", 1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert "application.py, line " in last
    assert '`if __name__ == "__main__":`' in last


@pytest.mark.parametrize(
    ("at_import", "said"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise LookupError('no such thing')", "LookupError: no such thing"),
        (
            "import multiprocessing; multiprocessing.get_context('spawn').Process().start()",
            "RuntimeError",
        ),
    ],
    ids=["exit", "exception", "process"],
)
def test_a_main_module_that_cannot_be_imported(at_import: str, said: str, tmp_path: Path) -> None:
    """An exception that ends the import does not end the program."""
    program = f'if __name__ != "__main__":\n    {at_import}\n' + USE + FUNCTION
    program += """
if __name__ == "__main__":
    try:
        use(CallableSource(function))
    except ValueError as error:
        print(error)
"""
    done = run_program(tmp_path, program, cloudpickle=False)
    assert (done.stderr, done.returncode) == ("", 0)
    assert said in done.stdout
    assert '`if __name__ == "__main__":`' in done.stdout


# What the helper process knows about the program

OWN_ERROR = (
    USE
    + """
class OwnError(Exception):
    pass

def function(offset, length):
    raise OwnError("page", offset)

if __name__ == "__main__":
    from pyuffd import HandlerError
    with Userfaultfd() as uffd, Region.anonymous(4096) as region:
        handler = Handler(uffd, driver="process")
        handler.serve(region, CallableSource(function))
        handler.start()
        try:
            handler.populate(region)
        except OSError:
            pass
        try:
            handler.stop()
        except HandlerError as error:
            print(type(error.__cause__) is OwnError, error.__cause__.args)
"""
)


@pytest.mark.parametrize("cloudpickle", [True, False], ids=["cloudpickle", "none"])
def test_exceptions_of_the_main_module(cloudpickle: bool, tmp_path: Path) -> None:
    done = run_program(tmp_path, OWN_ERROR, cloudpickle=cloudpickle)
    assert (done.stdout, done.stderr, done.returncode) == ("True ('page', 0)\n", "", 0)


PATHS = (
    USE
    + """
import os, sys
if __name__ == "__main__":
    with Userfaultfd() as uffd, Region.anonymous(8192) as region:
        with Handler(uffd, driver="process") as handler:
            sys.path.insert(0, "late")  # relative, and after the helper was started
            import late_module
            os.chdir("/")
            sys.path[0] = os.path.join(sys.argv[1], "late")
            handler.serve(region, late_module.Source())
            handler.start()
            print(region.read(0, 3))
"""
)


def test_modules_found_since_the_helper_started(tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "late_module.py").write_text(
        "class Source:\n    length = None\n    def read(self, offset, length):\n"
        "        import late_too\n        return late_too.BYTE * length\n"
    )
    (tmp_path / "late" / "late_too.py").write_text('BYTE = b"z"\n')
    done = run_program(tmp_path, PATHS, arguments=[str(tmp_path)])
    assert (done.stdout, done.stderr, done.returncode) == ("b'zzz'\n", "", 0)


def test_arguments_of_the_program(tmp_path: Path) -> None:
    """A main module that reads them when it is imported finds the same."""
    program = "import sys\nword = sys.argv[1]\n" + USE + FUNCTION + GUARDED_USE
    done = run_program(tmp_path, program, cloudpickle=False, arguments=["word"])
    assert (done.stdout, done.stderr, done.returncode) == (USED, "", 0)


def test_the_start_method_of_multiprocessing_is_left_alone(tmp_path: Path) -> None:
    program = USE + FUNCTION + GUARDED_USE
    program += "    import multiprocessing\n    multiprocessing.set_start_method('spawn')\n"
    done = run_program(tmp_path, program, cloudpickle=False)
    assert (done.stdout, done.stderr, done.returncode) == (USED, "", 0)


IN_A_CHILD = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

def child(method, depth):
    if depth:
        run(method, depth - 1)
    else:
        use(CallableSource(function))

def run(method, depth):
    process = multiprocessing.get_context(method).Process(target=child, args=(method, depth))
    process.start()
    process.join()
    assert process.exitcode == 0

if __name__ == "__main__":
    name, method = sys.argv[1:]
    if name == "pool":
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            pool.submit(child, method, 0).result()
    elif name == "daemon":
        context = multiprocessing.get_context(method)
        process = context.Process(target=child, args=(method, 0), daemon=True)
        process.start()
        process.join()
    else:
        run(method, int(name))
"""


@pytest.mark.crossing
@pytest.mark.parametrize(
    ("method", "name", "cloudpickle"),
    [
        *((method, depth, False) for method in ("fork", "spawn", "forkserver") for depth in "01"),
        ("spawn", "1", True),
        ("forkserver", "0", True),
        ("spawn", "pool", False),
        ("spawn", "daemon", False),
    ],
)
def test_in_a_child_of_multiprocessing(
    method: str, name: str, cloudpickle: bool, tmp_path: Path
) -> None:
    program = USE + FUNCTION + IN_A_CHILD
    done = run_program(
        tmp_path, program, cloudpickle=cloudpickle, arguments=[name, method], flags=["-u"]
    )
    assert (done.stdout, done.stderr, done.returncode) == (USED, "", 0)


def test_cloudpickle_is_left_as_it_was() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    before = cloudpickle.list_registry_pickle_by_value()
    _transport.pack(CallableSource(lambda offset, length: bytes(length)))
    assert cloudpickle.list_registry_pickle_by_value() == before


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("a string that has __main__ in it", False),
        (b"bytes that have __main__ in them, as a pickle may have", True),
        (["__mp_main__"], True),
        (dict, False),
    ],
    ids=["text", "bytes", "name", "other"],
)
def test_what_names_the_main_module(value: object, named: bool) -> None:
    import pickle

    assert _transport.names_main(pickle.dumps(value)) is named
