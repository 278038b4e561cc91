"""Unit tests of the data encode in this process; tests/cluster/data/test_prepare.py does it in Ray's tasks."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from tc_ray.data.encode import encode


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(encode_one: Any, items: list[dict[str, Any]]) -> list[pa.Table]:
        return [table for item in items for table in encode_one({name: [value] for name, value in item.items()})]

    monkeypatch.setattr(encode, "_in_ray", run)
