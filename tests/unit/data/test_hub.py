"""Data sets of the Hugging Face hub, from a server on this machine that speaks its calls, and folders that `datasets` has saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.data import DataSection
from tc_ray.data.source.find import find_sources
from tc_ray.data.source.readers import iter_records
from tc_ray.data.source.records import DataError
from tests.support.data_writers import HELD, SUMS, lines
from tests.support.hub_server import hub_server

ROOT = Path(__file__).resolve().parents[3]


def test_a_data_set_of_the_hub_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="not installed: pip install datasets"):
        find_sources(DataSection(train="hf://datasets/owner/name"))
    with pytest.raises(DataError, match="is hf://datasets/OWNER/NAME"):
        find_sources(DataSection(train="hf://owner/name"))


OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]
- config_name: other
  data_files: [{split: validation, path: main/test.jsonl}, {split: train, path: main/train.jsonl}]
- config_name: broken
  data_files: broken.jsonl
---
# Rows
"""
READ = """
import json, sys
from tc_ray.config.data import DataSection
from tc_ray.data.source.find import find_sources
from tc_ray.data.source.readers import iter_records

found = find_sources(DataSection(train=sys.argv[1]))
print(json.dumps({part: [r.value for f in files for r in iter_records(f)] for part, files in found.files.items()}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Reads a place in a process of its own, whose hub is a server: the rows by part, or what went wrong."""
    pytest.importorskip("datasets", reason="an optional package: pip install datasets")
    files = {
        "README.md": CARD.encode(),
        "main/train.jsonl": lines(tmp_path / "a.jsonl", SUMS).read_bytes(),
        "main/test.jsonl": lines(tmp_path / "b.jsonl", HELD).read_bytes(),
        "broken.jsonl": b'{"prompt": \n',
    }
    plain = {name.removeprefix("main/"): content for name, content in files.items() if name.startswith("main/")}
    with hub_server() as server:
        server.commits["datasets/owner/rows"] = {
            OLD: files | {"main/train.jsonl": b'{"prompt": "old", "completion": "x"}\n'},
            NEW: files,
        }
        server.commits["datasets/owner/plain"] = {NEW: plain}
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}

        def read(place: str) -> Any:
            command = [sys.executable, "-c", READ, place]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
            return json.loads(done.stdout) if done.returncode == 0 else done.stderr.splitlines()[-1]

        yield read


def test_splits_are_the_parts(hub: Callable[[str], Any]) -> None:
    """By name, configuration and revision; a set without a card has them by its files' names."""
    rows = {"train": SUMS, "validation": [], "test": HELD}
    assert hub("hf://datasets/owner/plain") == hub("hf://datasets/owner/rows/main") == rows
    assert hub("hf://datasets/owner/rows/other") == {"train": SUMS, "validation": HELD, "test": []}
    assert hub(f"hf://datasets/owner/rows@{OLD}/main")["train"] == [{"prompt": "old", "completion": "x"}]
    for place, why in (
        ("owner/none", "DatasetNotFoundError: Dataset 'owner/none' doesn't exist on the Hub"),
        ("owner/rows", "Config name is missing"),
        ("owner/rows/broken", "(JSON parse error"),
    ):
        said = hub(f"hf://datasets/{place}")
        assert f"DataError: hf://datasets/{place}: `datasets` cannot load it: " in said and why in said, said


def test_what_datasets_saves_is_read_without_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional package: pip install datasets")
    saved = {"train": datasets.Dataset.from_list(SUMS), "validation": datasets.Dataset.from_list(HELD)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "d", num_shards={"train": 3, "validation": 1})
    found = find_sources(DataSection(train=str(tmp_path / "d")))
    assert len(found.files["train"]) == 3
    assert [r.value for f in found.files["train"] for r in iter_records(f)] == SUMS
    assert [r.value for f in found.files["validation"] for r in iter_records(f)] == HELD
