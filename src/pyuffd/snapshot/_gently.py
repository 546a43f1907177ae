"""`gently`: work that lasts, in a thread that lets those of other programs go first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from pyuffd._errors import UffdOSError
from pyuffd._image_calls import be_gentle
from pyuffd._limits import start_thread

T = TypeVar("T")


def gently(work: Callable[[], T]) -> T:
    """Do work in such a thread, and wait for its end.

    A thread without privileges cannot raise its priority again: so the caller keeps its own. Ctrl-C
    waits for the end too, so the work is to be short.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        be_gentle()
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="uffd-gently")
    try:
        start_thread(thread)
    except UffdOSError:  # there can be no more threads
        return work()
    try:
        thread.join()
    finally:
        thread.join()
    if errors:
        raise errors[0]
    return results[0]
