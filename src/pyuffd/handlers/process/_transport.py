"""Send a page source to the worker process, by name or by value (layer L4).

Functions and classes of a module are sent by name. Every process has another main module under the
name `__main__`, so functions and classes of the main module are sent by value, like lambdas and
closures; this needs cloudpickle. Without cloudpickle the worker process imports the program's main
module under another name, as multiprocessing does.
"""

from __future__ import annotations

import importlib
import os
import pickle
import pickletools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyuffd._describe import described, repr_of, text_of
from pyuffd._limits import why_error

if TYPE_CHECKING:
    from pyuffd.sources import PageSource

# multiprocessing's spawn and forkserver call the main module of their children `__mp_main__`.
MAIN_NAMES = ("__main__", "__mp_main__")

INSTALL = "install cloudpickle (pip install 'pyuffd[cloudpickle]')"


@dataclass(frozen=True, slots=True)
class PackedSource:
    """A page source for another process.

    `main` tells how to import the program's main module, and is empty if that is not needed. `path`
    and `argv` are this process's sys.path and sys.argv.
    """

    blob: bytes
    main: dict[str, str]
    path: list[str]
    argv: list[str]

    def __reduce__(self) -> tuple[Any, ...]:
        # The keeper, which imports nothing of the program's, passes the blob on as it is.
        return PackedSource, (pickle.PickleBuffer(self.blob), self.main, self.path, self.argv)


class HandlerAtImportError(BaseException):
    """A module that the worker process imports to load a page source makes a Handler.

    The program has no main guard, and would run a second time. This is not an Exception, so that
    a program that catches those does not continue.
    """


# Packing


def pack(source: object) -> PackedSource:
    """Return a page source in the form in which it is sent.

    Raises:
        ValueError: it cannot be sent; the message tells what would help.
    """
    by_name: bytes | Exception
    try:
        by_name = pickle.dumps(source, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # PicklingError, AttributeError, TypeError, and what classes raise
        by_name = error
    if isinstance(by_name, bytes) and not names_main(by_name):
        return _packed(by_name)
    by_value = _by_value(source)
    if isinstance(by_value, bytes):
        return _packed(by_value)
    if isinstance(by_name, Exception):
        refused = by_name if by_value is None else by_value
        advice = f"{INSTALL}, " if by_value is None else ""
        raise ValueError(
            f"{repr_of(source)} cannot be sent to the helper process ({text_of(refused)}):"
            f" {advice}build it from functions and classes at the top level of a module and data"
            " that can be pickled, or use driver='thread'"
        ) from refused
    main = _main_module()
    if not main:
        raise ValueError(
            f"{repr_of(source)} needs what this program's main module defines, but the helper"
            " process cannot import that module: it is not a file (python -c, standard input, an"
            " interactive session, a notebook) or it is a __main__.py."
            f" {_advice(by_value)}, or use driver='thread'"
        )
    return _packed(by_name, main)


def _packed(blob: bytes, main: dict[str, str] | None = None) -> PackedSource:
    return PackedSource(blob, main or {}, _path(), list(getattr(sys, "argv", ())))


def _advice(by_value: Exception | None) -> str:
    """Return what would help and, if cloudpickle is installed, why it failed."""
    if by_value is None:
        return f"{INSTALL.capitalize()}, put the page source into a module of its own"
    return f"Put the page source into a module of its own: cloudpickle cannot send it ({by_value})"


def names_main(blob: bytes) -> bool:
    """Return whether a pickle names something of the main module."""
    if not any(name.encode() in blob for name in MAIN_NAMES):
        return False
    for _, arg, _ in pickletools.genops(blob):
        if isinstance(arg, str) and arg in MAIN_NAMES:
            return True
        # A pickle inside the pickle.
        if isinstance(arg, bytes | bytearray) and any(name.encode() in arg for name in MAIN_NAMES):
            return True
    return False


def _by_value(source: object) -> bytes | Exception | None:
    """Pickle objects of the main module by value; return None without cloudpickle."""
    try:
        cloudpickle: Any = importlib.import_module("cloudpickle")
    except ImportError:
        return None
    try:
        with _main_by_value(cloudpickle):
            blob: bytes = cloudpickle.dumps(source)
    except Exception as error:  # the object's classes may raise anything
        return error
    return blob


@contextmanager
def _main_by_value(cloudpickle: Any) -> Iterator[None]:
    """Let cloudpickle send the main module of a child of multiprocessing by value too."""
    main = sys.modules.get("__mp_main__")
    name = getattr(main, "__name__", "")
    if name != "__mp_main__" or name in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(main)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(main)


def _main_module() -> dict[str, str]:
    """Return how the worker process can import this program's main module; empty if it cannot.

    multiprocessing.spawn.get_preparation_data does the same, but sets the program's start method
    as a side effect.
    """
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        # multiprocessing does not import a __main__.py, which has no main guard.
        is_main = name == "__main__" or name.endswith(".__main__")
        return {} if is_main else {"init_main_from_name": name}
    path = getattr(main, "__file__", None)
    if path is None or not os.path.isfile(path):
        return {}
    return {"init_main_from_path": os.path.abspath(path)}


def _path() -> list[str]:
    """Return sys.path with absolute paths, for a process with another working directory."""
    found = []
    for entry in sys.path:
        with suppress(FileNotFoundError):  # relative to a working directory that was removed
            found.append(os.path.abspath(entry))
    return found


# Unpacking, in the worker process


class _Loading:
    """Whether a page source is being loaded, and where an imported module made a Handler."""

    running = False
    refused = ""


def unpack(packed: PackedSource) -> PageSource:
    """Load a page source.

    Raises:
        ValueError: it cannot be loaded; the message tells what would help.
    """
    sys.path[:] = [*packed.path, *(entry for entry in sys.path if entry not in packed.path)]
    sys.argv = list(packed.argv)
    importlib.invalidate_caches()
    what = "the program's main module" if packed.main else "its module"
    _Loading.running, _Loading.refused = True, ""
    try:
        if packed.main:
            _import_main(packed.main)
        source: PageSource = pickle.loads(packed.blob)
        if _Loading.refused:  # the module caught the exception
            raise HandlerAtImportError
    except HandlerAtImportError:
        raise ValueError(
            f"to load the page source the helper process imports {what}, which makes a Handler"
            f" when it is imported ({_Loading.refused}): put the program's statements under"
            ' `if __name__ == "__main__":`, or put the source into a module of its own,'
            f"{_or(packed)}"
        ) from None
    except BaseException as error:  # the user's modules may raise anything, even SystemExit
        advice = why_error(error) or (
            f"it is found by its name in {what}, which must be importable there and do its work"
            f' under `if __name__ == "__main__":`,{_or(packed)}'
        )
        raise ValueError(
            f"the page source cannot be loaded in the helper process ({described(error)}): {advice}"
        ) from error
    finally:
        _Loading.running = False
    return source


def _or(packed: PackedSource) -> str:
    return f" or {INSTALL}" if packed.main else " or use driver='thread'"


def _import_main(main: dict[str, str]) -> None:
    from multiprocessing import process, spawn

    current: Any = process.current_process()
    # multiprocessing refuses to start processes of a main module without a guard.
    current._inheriting = True
    try:
        spawn.prepare(dict(main))
    finally:
        del current._inheriting


def refuse_while_loading() -> None:
    """Raise HandlerAtImportError if this worker process is loading a page source.

    The Handler's constructor calls it.
    """
    if _Loading.running:
        caller = sys._getframe(2)  # of the Handler's constructor
        _Loading.refused = f"{caller.f_code.co_filename}, line {caller.f_lineno}"
        raise HandlerAtImportError(_Loading.refused)
