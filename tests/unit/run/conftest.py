"""A Pilot and training rows for a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.plan_samples import ROWS
from tests.support.tiny_model import make_tiny_llama


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"What is {i} + {i * i}?" + " please" * (i % 5), "completion": f"It is {i + i * i}"}
        for i in range(ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
