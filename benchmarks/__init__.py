"""Benchmarks: each one a ratio of pyuffd to a bare C program that ran beside it.

``python -m benchmarks.run`` runs them. `bench_*.py` say what is compared with what, `c/` holds the
C programs, `_members.py` is pyuffd's side of each pair.
"""
