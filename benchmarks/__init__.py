"""Benchmarks: each one is a ratio of pyuffd to a bare C program in the same run.

``python -m benchmarks.run`` runs them. `bench_*.py` define what is compared with what, `c/` has the
C programs, and `_members.py` is pyuffd's side of each pair.
"""
