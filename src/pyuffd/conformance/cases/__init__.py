"""The cases, by where they come from: one module of this table each (layer L5)."""

from __future__ import annotations

MODULES = (
    "errno_open",
    "errno_read",
    "errno_register",
    "errno_fill",
    "errno_copy",
    "errno_move",
    "errno_writeprotect",
    "errno_memory",
    "masks",
    "events",
    "pagemap_scan",
    "pagemap_scan_memory",
    "kselftest_api",
    "kselftest_unit",
    "kselftest_events",
    "kselftest_rwp",
    "kselftest_other",
    "kselftest_stress",
    "wp_series_faults",
    "wp_series_copy",
    "wp_series_markers",
    "wp_series_fork",
    "wp_series_traps",
    "swap_series",
    "thp",
    "zap",
    "kernel_access",
)
