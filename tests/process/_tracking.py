"""What tests of tracked memory and of snapshots of other processes need, and the methods."""

from __future__ import annotations

from pyuffd import Feature
from pyuffd.snapshot._capture import Used
from pyuffd.testing import needs, needs_privilege

# For `pytestmark`.
OF_OTHERS = [
    needs(Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM),
    needs_privilege("CAP_SYS_PTRACE", "CAP_SYS_ADMIN"),
]
METHODS: list[Used] = ["stopped", "precopy", "cow"]
