"""The sample of a table: every value is in a test that runs."""

from __future__ import annotations

import itertools
import random

from tests._crossings import left_out, sample, values

DRIVERS = ("native", "inline", "thread", "process")
MEMORY = ("anon", "shmem", "hugetlb", "hugetlb-private")


def test_every_value_is_chosen() -> None:
    rng = random.Random(1)
    for _ in range(50):
        rows = ["-".join(row) for row in itertools.product(DRIVERS, MEMORY, ("events", "no"))]
        rows = rng.sample(rows, rng.randrange(1, len(rows)))
        chosen = sample(rows)
        assert set(chosen) <= set(rows)
        assert set().union(*map(values, chosen)) == set().union(*map(values, rows))


def test_few_are_chosen() -> None:
    rows = ["-".join(row) for row in itertools.product(DRIVERS, MEMORY, ("events", "no"))]
    assert len(sample(rows)) <= 6
    assert sample(rows) == sample(rows)


def test_a_table_of_one_column_stays_whole() -> None:
    assert sample(DRIVERS) == list(DRIVERS)
    assert left_out({"tests/a.py::test": DRIVERS}) == set()


def test_every_third_row() -> None:
    tables = {"a.py::test": list("abcdefg")}
    assert left_out(tables, {"a.py::test": 3}) == {f"a.py::test[{row}]" for row in "bcef"}


def test_names_of_what_is_left_out() -> None:
    rows = ["native-anon", "native-shmem", "inline-anon", "inline-shmem"]
    assert left_out({"a.py::test": rows}) == {"a.py::test[native-shmem]", "a.py::test[inline-anon]"}
