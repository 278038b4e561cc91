"""`tc-ray init`: what it writes can be trained on, and it never writes over anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tc_ray.cli.init import InitError, init
from tc_ray.config.json_schema import SCHEMA_FILE
from tc_ray.config.load import load_config
from tc_ray.data.encode.encode import cut


def test_the_folder_is_a_run_that_loads_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init(tmp_path / "My first, run")
    folder = tmp_path / "My first, run"
    monkeypatch.chdir(tmp_path)
    config = load_config(folder / "recipe.yaml")
    assert config.run.name == "My-first-run"
    assert config.data.train == str(folder / "train.jsonl")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 240 and all(row.keys() == {"prompt", "completion"} for row in rows)
    first = (folder / "recipe.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert (folder / "recipe.schema.json").read_text() == SCHEMA_FILE.read_text()
    assert "outputs/My-first-run" in (folder / "README.md").read_text()


def test_an_empty_folder_is_filled_and_another_one_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    init(tmp_path / "empty")
    before = (tmp_path / "empty" / "recipe.yaml").stat().st_mtime_ns
    with pytest.raises(InitError, match="exists and is not an empty folder: name another one, nothing was written"):
        init(tmp_path / "empty")
    assert (tmp_path / "empty" / "recipe.yaml").stat().st_mtime_ns == before
    (tmp_path / "file").touch()
    with pytest.raises(InitError):
        init(tmp_path / "file")


@pytest.mark.parametrize("rows", [12, 50])
def test_a_few_rows_of_one_s_own_fill_rounds(rows: int, tmp_path: Path) -> None:
    """The parts for validation and test are shares: in counts they would take all of a small file."""
    init(tmp_path / "mine")
    config = load_config(tmp_path / "mine" / "recipe.yaml")
    parts = cut([str(row) for row in range(rows)], config.data.validation_size, config.data.test_size)
    assert parts.count("train") >= config.pilot.batch_size and {"validation", "test"} <= set(parts)
    assert config.data.template == "chat" and config.fusion.max_new_tokens >= 64
