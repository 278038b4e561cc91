"""Where `tc-ray eval` writes: never over a run's own report, unless the same is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tc_ray.run.evaluate import Asked, _default_out


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (Asked(), "evaluation"),
        (Asked(choose_again=True), "evaluation"),
        (Asked({"b": "b.jsonl", "a": "a.jsonl"}), "evaluation-a-b"),
        (Asked(metrics={"test": "nll"}), "evaluation-test.nll"),
        (Asked({"a": "a.jsonl"}, {"a": "nll"}), "evaluation-a-a.nll"),
    ],
)
def test_another_question_has_another_folder(tmp_path: Path, asked: Asked, name: str) -> None:
    run: Any = SimpleNamespace(run=tmp_path)
    assert _default_out([run], asked) == tmp_path / name
    assert _default_out([run, run], asked) == Path("evaluation"), "several models: the current folder"
