"""What docs/data.md and the README say of rows, answers and the recipe is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tc_ray.config.load import load_config
from tc_ray.data.source.shapes import Example, to_example
from tc_ray.evaluation.answers.scoring import matches

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return str(found)


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_the_sample_rows_can_be_trained_on(name: str) -> None:
    rows = [json.loads(line) for line in block((ROOT / name).read_text(), "json").splitlines()]
    examples = [to_example(row, held_out=False) for row in rows]
    assert [example.completion for example in examples if isinstance(example, Example)] == [
        "3 + 4 = 7. The answer is 7",
        "bad",
        "Yes.",
    ]
    assert [example.answer for example in examples if isinstance(example, Example)] == ["7", None, None]


def test_answers_are_judged_as_the_table_says() -> None:
    rows = re.findall(r"^\| [^|]*?((?:`[^`]+`(?:, )?)+) \| ([^|]+) \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 4
    for gold, right, wrong in rows:
        answer = re.findall(r"`([^`]+)`", gold)[0]
        assert all(matches(text, answer) for text in re.findall(r"`([^`]+)`", right)), (answer, right)
        assert not any(matches(text, answer) for text in re.findall(r"`([^`]+)`", wrong)), (answer, wrong)


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_the_recipe_is_one_of_ten_lines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = block((ROOT / name).read_text(), "yaml")
    assert len(text.splitlines()) == 10
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "recipe.yaml")
    assert config.pilot.learning_rate == 6e-4 and config.data.train == str(tmp_path / "rows.jsonl")
    assert config.run.path == tmp_path / "outputs" / "mine"
