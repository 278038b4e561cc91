"""kill -9 of the driver in mid-run, as when its machine goes away; the same command then finishes the run."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.driver import alive, start_driver
from tests.support.mistakelog_samples import in_order
from tests.support.tiny_run import assert_log_is_exact, tiny_config

ROUNDS = 60
SETTINGS = {"pilot__max_rounds": ROUNDS}


def config_of(folder: Path) -> RunConfig:
    return tiny_config(folder, **SETTINGS)


def killed_in_mid_run(folder: Path) -> int:
    """Start the run in a process of its own, kill that after a checkpoint; returns the round reached."""
    driver = start_driver(folder, **SETTINGS)
    run = config_of(folder).run.path
    end = time.monotonic() + 150
    try:
        while (
            latest_checkpoint(run / "pilot" / "checkpoints") is None or not (run / "copilot" / "checkpoints").exists()
        ):
            assert driver.poll() is None, (folder / "driver.log").read_text()[-3000:]
            assert time.monotonic() < end, (folder / "driver.log").read_text()[-3000:]
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    processes = read_status(run)["processes"]
    assert {"pilot-0", "copilot-0"} <= processes.keys()
    while any(alive(pid) for pid in processes.values()):
        assert time.monotonic() < end, f"workers outlive their driver: {processes}"
        time.sleep(0.1)
    return max((p["round"] for p in read_points(run / "metrics.jsonl") if p["kind"] == "pilot"), default=0)


@pytest.mark.slow
def test_same_command_finishes_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = config.run.path
    reached = killed_in_mid_run(tmp_path)
    checkpoint = latest_checkpoint(run / "pilot" / "checkpoints")
    assert checkpoint is not None
    assert reached < ROUNDS, "the run ended before the kill: raise ROUNDS"
    assert read_status(run)["state"] == "running"

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        result = run_job(config)
    finally:
        ray.shutdown()
    assert result.export is not None
    status = read_status(run)
    assert status["state"] == "done"
    texts = [event["text"] for event in status["events"]]
    assert f"Pilot attempt 2 resumes after round {checkpoint.round}" in texts
    assert any(text.startswith("Copilot resumes after step") for text in texts)
    train = json.loads((run / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, train)
    table = MistakeLog(run / "log").arrow(columns=["round", "attempt"])
    kept = {r for r, a in zip(table["round"].to_pylist(), table["attempt"].to_pylist(), strict=True) if a == 1}
    assert kept == set(range(1, checkpoint.round + 1))
    points = list(read_points(run / "metrics.jsonl"))
    assert [p["round"] for p in points if p["kind"] == "pilot"] == list(range(1, ROUNDS + 1))
    assert [p["step"] for p in points if p["kind"] == "copilot"] == list(range(1, 2 * ROUNDS + 1))


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """A round is a function of weights, seed and number: what a killed run logs in the end is bit for bit the same."""
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
    assert killed_in_mid_run(tmp_path / "killed") < ROUNDS
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for name in ("killed", "straight"):
            run_job(config_of(tmp_path / name))
    finally:
        ray.shutdown()
    killed, straight = (
        MistakeLog(config_of(tmp_path / name).run.path / "log").records() for name in ("killed", "straight")
    )
    killed, straight = map(in_order, (killed, straight))
    for field in ("round", "sample_id", "seen", "input_ids", "rationale", "error_ids", "error_values", "token_loss"):
        np.testing.assert_array_equal(getattr(killed, field), getattr(straight, field), err_msg=field)
    from transformers import AutoModelForCausalLM

    one, other = (
        AutoModelForCausalLM.from_pretrained(config_of(tmp_path / name).run.path / "pilot" / "final").state_dict()
        for name in ("killed", "straight")
    )
    assert all(torch.equal(one[key], other[key]) for key in other)
