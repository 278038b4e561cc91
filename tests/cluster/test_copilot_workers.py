"""Two learners in a real run: a process group of their own, every step once, and what one learner does on whole batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from tc_ray.config.schema import RunConfig
from tc_ray.job import run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.tiny_run import Killer, assert_log_is_exact, tiny_config

ROUNDS = 6
STEPS = 2 * ROUNDS


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config_of(folder: Path, workers: int, **changes: Any) -> RunConfig:
    folder.mkdir()
    return tiny_config(folder, resources__copilot_workers=workers, **changes)


def steps_of(config: RunConfig) -> list[dict[str, Any]]:
    return [p for p in read_points(config.run.path / "metrics.jsonl") if p["kind"] == "copilot"]


def test_two_learners_do_what_one_does(tmp_path: Path) -> None:
    """In lock-step, so that both runs draw the same: losses step by step, and the weights in the end."""
    found = {}
    for workers in (1, 2):
        config = config_of(
            tmp_path / str(workers),
            workers,
            pilot__max_rounds=ROUNDS,
            copilot__schedule="lockstep",
            copilot__batch_size=8,
        )
        run_job(config)
        processes = read_status(config.run.path)["processes"]
        assert {name for name in processes if name.startswith("copilot")} == {f"copilot-{n}" for n in range(workers)}
        steps = steps_of(config)
        assert [p["step"] for p in steps] == list(range(1, STEPS + 1))
        found[workers] = steps, load_file(config.run.path / "copilot" / "final" / "model.safetensors")
    (one, one_weights), (two, two_weights) = found[1], found[2]
    for name in ("loss", "error_size", "tokens"):
        np.testing.assert_allclose(
            [p["metrics"][name] for p in two], [p["metrics"][name] for p in one], rtol=1e-3, err_msg=name
        )
    assert one[-1]["metrics"]["loss"] < one[0]["metrics"]["loss"], "nothing was learned: the comparison proves little"
    assert one_weights.keys() == two_weights.keys()
    # sums run in another order, which AdamW's first steps make up to a part of a step of: 1e-3, twelve of them
    for name, weight in one_weights.items():
        assert float((weight - two_weights[name]).abs().mean()) < 1e-4, name
        assert torch.isfinite(weight).all()


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
