"""Rules over several fields, as docs/config.md lists them: each is refused in one message that names the fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.load import load_config
from tc_ray.config.yaml_file import ConfigError

RULES: list[tuple[list[str], str]] = [
    (
        ["pilot.batch_size=2", "resources.pilot_workers=3"],
        "pilot.batch_size 2 must be at least resources.pilot_workers 3",
    ),
    (
        ["copilot.batch_size=1", "resources.copilot_workers=2"],
        "copilot.batch_size 1 must be at least resources.copilot_workers 2",
    ),
    (
        ["resources.pilot_gpus=0.5", "resources.pilot_workers=2"],
        "resources.pilot_gpus 0.5 lets two of 2 workers share a GPU",
    ),
    (["resources.copilot_gpus=0.3", "resources.copilot_workers=4"], "set it above 0.5, or resources.copilot_workers=1"),
    (["resources.pilot_gpus=2"], "For more GPUs set more workers"),
    (["resources.pilot_resources={GPU: 1}"], "GPU is no custom resource: set resources.pilot_gpus"),
    (["resources.copilot_resources={memory: 1e9}"], "memory is no custom resource: leave it out"),
    (["resources.copilot_resources={rack: 0}"], "greater than or equal to 0.0001"),
    (
        ["resources.pilot_min_workers=3", "resources.pilot_workers=2"],
        "resources.pilot_min_workers 3 must not be above resources.pilot_workers 2",
    ),
    (["copilot.schedule=lockstep", "log.enabled=false"], "copilot.schedule lockstep needs log.enabled"),
    (["log.keep_rounds=127"], "log.keep_rounds 127 must be at least copilot.buffer_rounds 128"),
    (["fusion.lam_grid=[0.1, 0.5]"], "lam_grid must contain 0"),
    (["fusion.metric=ranking"], "fusion.metric ranking needs data.format sequences"),
    (["data.format=sequences", "data.test=x.txt"], "leave out validation and test"),
    (["data.format=sequences", "data.validation=x.txt"], "leave out validation and test"),
]


@pytest.mark.parametrize(("overrides", "words"), RULES, ids=[" ".join(overrides) for overrides, _ in RULES])
def test_each_rule_is_refused_by_name(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pilot.batch_size=16", "resources.pilot_workers=7", "pilot.micro_batch_size=2"],
        ["pilot.batch_size=3", "resources.pilot_workers=3"],
        ["copilot.batch_size=9", "resources.copilot_workers=2"],
        ["resources.pilot_gpus=0.5", "resources.copilot_gpus=0.5"],
        ["resources.pilot_gpus=0.6", "resources.pilot_workers=2"],
        ["resources.pilot_resources={'accelerator_type:H100': 0.01}", "resources.copilot_resources.rack_b=1"],
        ["log.keep_rounds=128"],
        ["data.format=sequences", "fusion.metric=ranking"],
    ],
    ids=" ".join,
)
def test_what_keeps_the_rules_is_taken(overrides: list[str]) -> None:
    load_config(None, overrides)


def test_each_model_computes_in_the_type_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pilot on GPUs beside learners on CPUs without instructions for bf16, and the other way round."""
    monkeypatch.setattr(Path, "read_text", lambda *_: "flags: sse2")
    for gpus, dtypes in (
        ([], ("fp32", "fp32")),
        (["resources.pilot_gpus=1"], ("bf16", "fp32")),
        (["resources.copilot_gpus=0.5"], ("fp32", "bf16")),
        (["resources.pilot_gpus=1", "pilot.dtype=fp32", "resources.copilot_gpus=1"], ("fp32", "bf16")),
    ):
        config = load_config(None, gpus)
        assert (config.pilot.dtype, config.copilot.dtype) == dtypes, gpus


def test_a_run_is_kept_in_outputs_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: Any = load_config(None, ["run.name=mine"]).run
    assert made.path == tmp_path / "outputs" / "mine"
    assert load_config(None, ["run.folder=there"]).run.path == tmp_path / "there"
