"""Tables of states and options: a sample runs by default, all with PYUFFD_CROSSINGS=all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

ALL = os.environ.get("PYUFFD_CROSSINGS") == "all"


def values(test_id: str) -> set[str]:
    """Return the values that make up a test's id: `native-anon-events` has three."""
    return {f"{place}:{word}" for place, word in enumerate(test_id.split("-"))}


def sample(ids: Iterable[str]) -> list[str]:
    """Choose a few of the ids, so that each value of any id is in one that was chosen.

    The choice is greedy: each step takes an id with the most values that are still missing, and
    among these the first one whose values were chosen least. It is the same for the same ids.

    Example:
        >>> sample(["native-anon", "native-shmem", "inline-anon", "inline-shmem"])
        ['native-anon', 'inline-shmem']
    """
    rows = {test_id: values(test_id) for test_id in ids}
    uses = Counter({value: 0 for row in rows.values() for value in row})

    def gain(test_id: str) -> tuple[int, int]:
        row = rows[test_id]
        return sum(not uses[value] for value in row), -sum(uses[value] for value in row)

    chosen = []
    while not all(uses.values()):
        chosen.append(max(rows, key=gain))
        uses.update(rows[chosen[-1]])
    return chosen


def left_out(
    tables: Mapping[str, Sequence[str]], every: Mapping[str, int] | None = None
) -> set[str]:
    """Return the ids that are not run by default, by the name of the table's test.

    `every` maps tables of which every n-th row runs, instead of a sample with each value, to n.
    """
    steps = every or {}
    return {
        f"{test}[{test_id}]"
        for test, ids in tables.items()
        for test_id in set(ids) - set(ids[:: steps[test]] if test in steps else sample(ids))
    }
