"""Data sets of the Hugging Face hub, and folders that `datasets` has saved. A folder stands for the hub: `datasets` takes either."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tc_ray.config.data import DataSection
from tc_ray.data.source.find import find_sources
from tc_ray.data.source.readers import iter_records
from tc_ray.data.source.records import DataError
from tests.support.data_writers import HELD, SUMS, lines


def test_a_data_set_of_the_hub_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="not installed: pip install datasets"):
        find_sources(DataSection(train="hf://datasets/owner/name"))
    with pytest.raises(DataError, match="is hf://datasets/OWNER/NAME"):
        find_sources(DataSection(train="hf://owner/name"))


def test_splits_are_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional package: pip install datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines(tmp_path / "owner" / "name" / "train.jsonl", SUMS)
    lines(tmp_path / "owner" / "name" / "test.jsonl", HELD)
    found = find_sources(DataSection(train="hf://datasets/owner/name"))
    values = {part: [r.value for f in files for r in iter_records(f)] for part, files in found.files.items()}
    assert values == {"train": SUMS, "validation": [], "test": HELD}
    with pytest.raises(DataError, match="hf://datasets/owner/none: `datasets` cannot load it: "):
        find_sources(DataSection(train="hf://datasets/owner/none"))


def test_what_datasets_saves_is_read_without_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional package: pip install datasets")
    saved = {"train": datasets.Dataset.from_list(SUMS), "validation": datasets.Dataset.from_list(HELD)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "d", num_shards={"train": 3, "validation": 1})
    found = find_sources(DataSection(train=str(tmp_path / "d")))
    assert len(found.files["train"]) == 3
    assert [r.value for f in found.files["train"] for r in iter_records(f)] == SUMS
    assert [r.value for f in found.files["validation"] for r in iter_records(f)] == HELD
