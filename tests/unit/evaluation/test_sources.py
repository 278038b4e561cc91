"""Which models a folder gives, and what they are known by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.evaluation.sources import find_source
from tc_ray.models.folder import FusionSettings
from tc_ray.run.evaluate import _leading_config
from tests.support.evaluation_samples import source
from tests.support.tiny_model import make_tiny_llama, make_tokenizer


def pilot(folder: Path) -> Path:
    make_tokenizer().save_pretrained(make_tiny_llama(folder))
    return folder


def test_a_run_whose_copilot_failed_is_its_pilot(tmp_path: Path) -> None:
    save_config(RunConfig(), tmp_path / "config.yaml")
    pilot(tmp_path / "pilot" / "final")
    pilot(tmp_path / "export" / "pilot")
    FusionSettings(0.0, "probability", "own").write(tmp_path / "export")
    run, export = find_source(f"r={tmp_path}"), find_source(f"e={tmp_path / 'export'}")
    assert (run.models, run.run, run.no_copilot) == (("r",), tmp_path, "the run's Copilot failed")
    assert (export.models, export.weights) == (("e",), run.weights)


def test_another_end_token_is_another_model(tmp_path: Path) -> None:
    """The weights are the same, and prompts without a gold completion too; where answers end is not."""
    before = find_source(str(pilot(tmp_path / "m")))
    file = tmp_path / "m" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"eos_token": settings["pad_token"]}))
    assert find_source(str(tmp_path / "m")).weights != before.weights


def test_the_run_whose_sets_are_measured_says_by_what(tmp_path: Path) -> None:
    """Also where an exported folder with settings of its own is named first."""
    run, export = RunConfig(), RunConfig()
    run.run.name, export.run.name = "run", "export"
    for config in (run, export):
        (tmp_path / config.run.name).mkdir()
        save_config(config, tmp_path / config.run.name / "config.yaml")
    of_export = replace(source("e"), pilot=str(tmp_path / "export" / "pilot"))
    of_run = replace(source("r"), pilot=str(tmp_path / "run" / "pilot" / "final"), run=tmp_path / "run")
    assert _leading_config([of_export, of_run]).run.name == "run"
    assert _leading_config([of_export]).run.name == "export"
