"""Unit tests of the data encode in this process; tests/cluster/data/test_prepare.py does it in Ray's tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest

from tc_ray.data.encode import encode
from tc_ray.data.prepared import prepare
from tc_ray.data.source.files import DataFile


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(encode_one: Callable[[DataFile], pa.Table], files: Sequence[DataFile]) -> list[pa.Table]:
        return [encode_one(file) for file in files]

    monkeypatch.setattr(encode, "_in_ray", run)
    monkeypatch.setattr(prepare, "cpus", lambda: 3)
