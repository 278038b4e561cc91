"""Asynchronous equals synchronous: the Copilot that steps while the Pilot runs on ends where one in lock-step ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tests.support.local_ray import local_ray
from tests.support.tiny_run import tiny_config

ROUNDS = 60
STEPS_PER_ROUND = 3
LAM = 1.0

cluster = local_ray(cpus=2)


def run(folder: Path, schedule: str) -> tuple[float, np.ndarray]:
    """Teacher-forced error ratio on validation data, and for each round the rounds the Copilot was behind."""
    folder.mkdir()
    config = tiny_config(
        folder,
        pilot__max_rounds=ROUNDS,
        pilot__checkpoint_every_rounds=30,
        copilot__schedule=schedule,
        copilot__steps_per_round=STEPS_PER_ROUND,
        copilot__batch_size=16,
        copilot__learning_rate=3e-3,
        fusion__lam_grid=[0.0, LAM],
        fusion__max_validation_rows=12,
    )
    report: Any = run_job(config).report
    points = list(read_points(config.run.path / "metrics.jsonl"))
    stepped = np.array([p["time"] for p in points if p["kind"] == "copilot" and p["step"] % STEPS_PER_ROUND == 0])
    rounds = np.array([p["time"] for p in points if p["kind"] == "pilot"])
    assert len(stepped) == len(rounds) == ROUNDS
    behind = np.arange(1, ROUNDS + 1) - (stepped[None] < rounds[:, None]).sum(1)
    (ratio,) = [row["error_ratio"] for row in report.first.chosen.grid if row["lam"] == LAM]
    return ratio, behind


@pytest.mark.slow
def test_asynchronous_ends_where_lockstep_ends(tmp_path: Path) -> None:
    """E||p - p~||^2 / E||p - p^||^2 of both, at lambda 1.

    The Pilots are bit for bit the same; the Copilots take as many steps of the same schedule but draw from the rounds that
    happen to be there, so they differ as two seeds of the draw do. Measured: 0.3647 and 0.3640 with up to 30 rounds of lag.
    The tolerance of 0.02 leaves room for other lags and is a thirtieth of the gain itself (1 - 0.36).
    """
    lockstep, in_step = run(tmp_path / "lockstep", "lockstep")
    asynchronous, behind = run(tmp_path / "async", "async")
    # a round is reported before its Copilot steps: never more than that one behind
    assert in_step.max() <= 1
    assert behind.max() > 1, "the asynchronous run was never behind: nothing is compared"
    assert lockstep < 0.6 and asynchronous < 0.6, (lockstep, asynchronous)
    assert abs(lockstep - asynchronous) < 0.02, (lockstep, asynchronous)
