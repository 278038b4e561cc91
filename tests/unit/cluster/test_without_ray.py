"""Commands that only look at a run, or work on its files, never load Ray: they run where no cluster is, beside one that is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.models.identity import tokenizer_hash
from tc_ray.tracking.tracker import Tracker
from tests.support.inspection_samples import make_examples, make_log
from tests.support.tiny_model import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import json, sys
from typer.testing import CliRunner
from tc_ray.cli.main import app
ends = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
print(json.dumps([(end.exit_code, end.output[-500:]) for end in ends]))
print("ray" in sys.modules)
"""


def told_by(commands: list[list[str]]) -> tuple[list[tuple[int, str]], bool]:
    """(exit code, output) of each command, one after the other in one process; whether that has imported Ray."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands)],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    ends, imported = done.stdout.splitlines()[-2:]
    return [(code, output) for code, output in json.loads(ends)], imported == "True"


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a status, metrics and a log of its own."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": folder}, "tracking": {"enabled": False}})
    tracker = Tracker(config, folder, {"rounds_total": 2, "copilot_steps_total": 2})
    tracker.pilot(1, {"loss": 3.0, "tokens": 100})
    tracker.finish("done")
    make_tokenizer().save_pretrained(folder / "pilot" / "final")
    examples = make_examples(samples=6, epochs=2, vocab=258)
    make_log(folder / "log", examples, tokenizer_hash=tokenizer_hash(make_tokenizer()))
    (folder / "config.yaml").write_text("run: {name: trial}\n")
    return folder


def test_status_and_log_commands_need_no_ray(run: Path, tmp_path: Path) -> None:
    """Looking, checking, exporting, and those that change the table."""
    ends, imported = told_by(
        [
            ["status", str(run)],
            ["status", str(run), "--json"],
            ["status", str(run), "--follow"],
            ["log", "stats", str(run)],
            ["log", "show", str(run), "--worst", "1"],
            ["log", "report", str(run), "--out", str(tmp_path / "report.html")],
            ["log", "export", str(run), "--out", str(tmp_path / "rows.jsonl")],
            ["log", "verify", str(run)],
            ["log", "vacuum", str(run)],
        ]
    )
    assert [code for code, _ in ends] == [0] * 9, ends
    assert not imported
