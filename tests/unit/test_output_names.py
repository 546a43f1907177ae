"""An output whose name something has is refused with what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyuffd.snapshot._files import check_absent


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="choose another name, or remove it") as said:
        check_absent(tmp_path)
    assert said.value.filename == str(tmp_path)
