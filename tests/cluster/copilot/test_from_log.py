"""A Copilot from a stored log: the live one's result given the same draws, restarts, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tc_ray.cli.main import app
from tc_ray.config.schema import RunConfig
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.from_log import StoredLogError, train_from_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table.lease import LeaseHeldError
from tc_ray.run.folder import FolderLock
from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tests.support.mistakelog_samples import merge_all
from tests.support.tiny_model import make_tiny_llama
from tests.support.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """A finished lock-step run, whose draws follow from the step's number alone."""
    config = tiny_config(
        tmp_path_factory.mktemp("run"),
        pilot__max_rounds=ROUNDS,
        copilot__schedule="lockstep",
        copilot__steps_per_round=4,  # 24 steps: the error ratio is measured once
        copilot__output_tokens="all",
        copilot__checkpoint_every_steps=4,
        copilot__buffer_rounds=3,
        copilot__every=1,
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run_job(config)
    finally:
        ray.shutdown()
    yield config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    unequal = [name for name in left if not torch.equal(left[name], right[name])]
    assert not unequal


def test_replay_is_the_live_training_bit_for_bit(run: RunConfig, tmp_path: Path) -> None:
    live = run.run.path / "copilot" / "final"
    with MistakeLog(run.log_location) as mistakes:
        trained = train_from_log(mistakes, run, tmp_path / "again")
    assert trained.steps == ROUNDS * run.copilot.steps_per_round
    assert_equal(trained.folder, live)
    assert trained.loss is not None and trained.uncorrected is not None
    (ratio,) = trained.ratios
    measured = [point for point in read_points(run.run.path / "metrics.jsonl") if point["kind"] == "error_ratio"]
    assert [(point["round"], point["metrics"]) for point in measured] == [(ratio.round, ratio.metrics())]
    assert (ratio.step, ratio.round) == (20, ROUNDS)
    assert f"held out  error ratio {ratio.text()}" in trained.lines()


def test_files_of_other_lengths_make_no_difference(run: RunConfig, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "log"
    shutil.copytree(run.log_location, copy)
    merge_all(copy)
    with MistakeLog(copy) as mistakes:
        assert len(mistakes.files) == 1
        trained = train_from_log(mistakes, run, tmp_path / "again")
    assert_equal(trained.folder, run.run.path / "copilot" / "final")


class Cut(Exception):
    pass


def test_a_cut_training_goes_on_to_the_same_result(run: RunConfig, tmp_path: Path) -> None:
    def cut(at: Position, *_: Any) -> None:
        if at.step == 7:
            raise Cut

    with MistakeLog(run.log_location) as mistakes:
        straight = train_from_log(mistakes, run, tmp_path / "straight")
        with pytest.raises(Cut):
            train_from_log(mistakes, run, tmp_path / "cut", show=cut)
        steps: list[int] = []
        again = train_from_log(mistakes, run, tmp_path / "cut", show=lambda at, *_: steps.append(at.step))
    assert steps[0] == 5  # after the checkpoint at step 4
    assert_equal(again.folder, straight.folder)
    points = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert points == list(range(1, straight.steps + 1))
    with MistakeLog(run.log_location) as mistakes:  # finished: nothing is trained, all is read from the folder
        finished = train_from_log(mistakes, run, tmp_path / "cut")
    assert finished.ratios == again.ratios == straight.ratios


def test_the_command(run: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "copilot"
    told = CliRunner().invoke(
        app,
        ["train-copilot", str(run.run.path), "copilot.steps_per_round=1", "--out", str(out)],
        catch_exceptions=False,
    )
    assert told.exit_code == 0, told.output
    assert f"copilot   {out / 'final'} ({ROUNDS} steps)" in told.output
    assert f"copilot step {ROUNDS}/{ROUNDS} | round {ROUNDS} | loss" in told.stderr


def test_the_command_needs_no_ray(run: RunConfig, tmp_path: Path) -> None:
    code = "import atexit, sys; atexit.register(lambda: print('ray' in sys.modules)); from tc_ray.cli.main import main; main()"
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "train-copilot",
            str(run.run.path),
            "--out",
            str(tmp_path / "out"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert told.stdout.splitlines()[-1] == "False"


def test_refusals(run: RunConfig, tmp_path: Path) -> None:
    with MistakeLog(run.log_location) as mistakes:
        other = run.model_copy(deep=True)
        other.log.pooling = "max"
        with pytest.raises(StoredLogError, match=r"holds states pooled by 'mean', log\.pooling is 'max'"):
            train_from_log(mistakes, other, tmp_path / "a")
        other = run.model_copy(deep=True)
        other.model.pilot = "smollm2-135m-instruct"
        with pytest.raises(StoredLogError, match=r"set model\.pilot to the same model"):
            train_from_log(mistakes, other, tmp_path / "b")
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "mine.txt").write_text("x")
        with pytest.raises(StoredLogError, match="is not empty"):
            train_from_log(mistakes, run, tmp_path / "c")
        train_from_log(mistakes, run, tmp_path / "d")
        other = run.model_copy(deep=True)
        other.run.seed += 1
        with pytest.raises(StoredLogError, match=r"run\.seed: 17 -> 18"):
            train_from_log(mistakes, other, tmp_path / "d")


def test_two_trainings_of_one_folder_are_refused(run: RunConfig, tmp_path: Path) -> None:
    """Found beside fault 2: a second command on the same folder mixed its steps into metrics.jsonl."""
    out = tmp_path / "copilot"
    with FolderLock(tmp_path, "train-copilot into copilot", name=".copilot.lock"):
        refused = CliRunner().invoke(app, ["train-copilot", str(run.run.path), "--out", str(out)])
    assert isinstance(refused.exception, LeaseHeldError) and "is in use: train-copilot into copilot" in str(
        refused.exception
    )
    assert not out.exists()


def test_other_base_weights_are_refused(run: RunConfig, tmp_path: Path) -> None:
    """Fault 2: the log's errors are those of a Pilot that started from certain weights, a checkpoint lies over its base's."""
    other = run.model_copy(deep=True)
    other.model.pilot = str(make_tiny_llama(tmp_path / "model", seed=1))  # the same name and tokenizer
    with MistakeLog(run.log_location) as mistakes:
        with pytest.raises(StoredLogError, match=r"started from other weights than those of model\.pilot"):
            train_from_log(mistakes, other, tmp_path / "a")
        other = run.model_copy(deep=True)
        other.model.copilot = str(make_tiny_llama(tmp_path / "base", seed=2))
        train_from_log(mistakes, other, tmp_path / "b")
        make_tiny_llama(tmp_path / "base", seed=3)
        with pytest.raises(StoredLogError, match=r"holds another training.*copilot_weights"):
            train_from_log(mistakes, other, tmp_path / "b")
