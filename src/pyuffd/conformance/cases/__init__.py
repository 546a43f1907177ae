"""The cases, by where they come from: one module of this table each (layer L5)."""

from __future__ import annotations

MODULES = (
    "kselftest_api",
    "kselftest_unit",
    "kselftest_events",
    "kselftest_rwp",
    "kselftest_other",
    "kselftest_stress",
)
