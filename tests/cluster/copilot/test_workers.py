"""Two learners in a real run: a process group of their own, every step once, and what one learner does on whole batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.from_log import train_from_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.local_ray import local_ray
from tests.support.tiny_run import Killer, assert_log_is_exact, tiny_config

ROUNDS = 6
STEPS = 2 * ROUNDS

cluster = local_ray(cpus=3)


def config_of(folder: Path, workers: int, **changes: Any) -> RunConfig:
    folder.mkdir()
    return tiny_config(folder, resources__copilot_workers=workers, **changes)


def steps_of(config: RunConfig) -> list[dict[str, Any]]:
    return [p for p in read_points(config.run.path / "metrics.jsonl") if p["kind"] == "copilot"]


@pytest.mark.slow
def test_two_learners_do_what_one_does(tmp_path: Path) -> None:
    """A lock-step run, whose draws follow from the steps' numbers, against one learner that replays its log.

    Of the 7 records of a batch one learner takes four, the other three.
    """
    changes = {"copilot__schedule": "lockstep", "copilot__batch_size": 7}
    config = config_of(tmp_path / "run", 2, pilot__max_rounds=ROUNDS, **changes)
    run_job(config)
    processes = read_status(config.run.path)["processes"]
    assert {name for name in processes if name.startswith("copilot")} == {"copilot-0", "copilot-1"}
    steps = steps_of(config)
    assert [p["step"] for p in steps] == list(range(1, STEPS + 1))
    with MistakeLog(config.log_location) as mistakes:
        alone = train_from_log(mistakes, config, tmp_path / "alone")
    points = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "error_size"):
        np.testing.assert_allclose([p["metrics"][name] for p in steps], [p[name] for p in points], rtol=1e-3)
    assert points[-1]["loss"] < points[0]["loss"], "nothing was learned: the comparison proves little"
    both, one = (
        load_file(folder / "model.safetensors") for folder in (config.run.path / "copilot/final", alone.folder)
    )
    assert both.keys() == one.keys()
    # sums run in another order, which AdamW's first steps may make up to a part of a step of: 1e-3, twelve of them
    for name, weight in one.items():
        assert float((weight.double() - both[name].double()).abs().mean()) < 1e-4, name


@pytest.mark.slow
def test_one_of_two_learners_dies(tmp_path: Path) -> None:
    """Its peer waits for it in a collective: both are replaced, and every step is taken once."""
    rounds = 200
    config = config_of(tmp_path / "run", 2, pilot__max_rounds=rounds, copilot__steps_per_round=1)
    run = config.run.path
    with Killer(run, "copilot-1", lambda status: status["copilot"].get("step", 0) >= 15) as killer:
        result = run_job(config)
    assert killer.killed_at is not None and result.export is not None
    status = read_status(run)
    assert (status["state"], status["restarts"]) == ("done", 1)
    assert [p["step"] for p in steps_of(config)] == list(range(1, rounds + 1))
    assert_log_is_exact(config, rounds, json.loads((run / "data" / "data.json").read_text())["rows"]["train"])
