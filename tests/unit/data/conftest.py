"""Unit tests of the data encode in this process; tests/cluster/data/test_prepare.py does it in Ray's tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from tc_ray.data.encode import encode


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(encode_one: Callable[[Path], pa.Table], files: Sequence[Path]) -> list[pa.Table]:
        return [encode_one(file) for file in files]

    monkeypatch.setattr(encode, "_in_ray", run)
