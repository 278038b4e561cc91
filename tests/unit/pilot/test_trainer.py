"""Parts of the Pilot that need no worker: checkpoints that count, the schedule, batch arithmetic."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tc_ray.cluster.session import pilot_need
from tc_ray.config.schema import RunConfig
from tc_ray.models.schedule import rate_factor
from tc_ray.pilot import loop
from tc_ray.pilot.checkpoint import PilotCheckpoint, latest_checkpoint, mark_complete
from tc_ray.pilot.engine import deepspeed_config
from tc_ray.pilot.loop import PilotJob, train_worker
from tc_ray.pilot.room import Growth
from tc_ray.pilot.trainer import _fit


def complete(root: Path, number: int, keep: int = 2) -> Path:
    folder = root / f"round-{number:06d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("x")
    mark_complete(folder, round_number=number, world_size=2, zero_stage=1, keep=keep)
    return folder


def test_only_marked_checkpoints_count(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    first = complete(tmp_path, 5)
    debris = tmp_path / "round-000010"  # the crash came before the marker
    debris.mkdir()
    (debris / "weights").write_text("half")
    (debris / "complete.json.tmp").write_text("{")
    assert latest_checkpoint(tmp_path) == PilotCheckpoint(first, 5, 2, 1)


@pytest.mark.parametrize("keep", [1, 2])
def test_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    numbers = [5, 10, 999_995, 1_000_000]  # a seventh digit must not sort before six
    for count, number in enumerate(numbers, start=1):
        complete(tmp_path, number, keep)
        left = sorted(int(p.name.split("-")[1]) for p in tmp_path.iterdir())
        assert left == numbers[max(0, count - keep) : count]
        latest = latest_checkpoint(tmp_path)
        assert latest is not None and latest.round == number


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    factors = [rate_factor(i, steps=100, warmup_ratio=0.1, schedule="cosine") for i in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert 0 < factors[99] < 0.001
    # never a first round that trains nothing, nor a division by zero
    assert rate_factor(0, steps=1, warmup_ratio=0.0, schedule="cosine") == 1.0


def test_batch_arithmetic_reaches_deepspeed() -> None:
    config = RunConfig.model_validate(
        {
            "pilot": {"batch_size": 47, "micro_batch_size": 4, "zero_stage": 3, "max_grad_norm": 0.7, "dtype": "bf16"},
            "resources": {"pilot_workers": 3},
        }
    )
    made = deepspeed_config(config)
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 4  # of 16 rows on two of the workers, of 15 on the third
    assert "train_batch_size" not in made  # DeepSpeed would refuse one that is not the product
    assert made["zero_optimization"]["stage"] == 3
    assert made["gradient_clipping"] == 0.7
    assert made["bf16"] == {"enabled": True}


def test_what_ray_train_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own classes check it: a part of a GPU, custom resources, the strategy; the Copilot's device does not matter."""
    import ray.train.torch

    asked: dict[str, Any] = {}

    class Asked(ray.train.torch.TorchTrainer):
        def __init__(self, *_: Any, **given: Any) -> None:
            asked.update(given)

        def fit(self) -> Any:
            return None

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Asked)
    for resources, backend, bundle, strategy in (
        ({"copilot_gpus": 1}, "gloo", {"CPU": 1}, "PACK"),
        (
            {"pilot_gpus": 0.5, "pilot_resources": {"rack_a": 0.25}, "placement": "spread"},
            "nccl",
            {"CPU": 1, "GPU": 0.5, "rack_a": 0.25},
            "SPREAD",
        ),
    ):
        config = RunConfig.model_validate({"run": {"folder": tmp_path}, "resources": resources})
        job, need = PilotJob(config, "model", tmp_path / "train.parquet", 1, None, None), pilot_need(config)
        _fit(job, need, Growth(job, need, need.count))
        scaling = asked["scaling_config"]
        assert asked["torch_config"].backend == backend
        assert (scaling.placement_strategy, scaling.num_workers) == (strategy, 1)
        assert scaling.resources_per_worker == bundle and scaling.use_gpu == ("GPU" in bundle)


@pytest.mark.parametrize(("gpus", "accelerator"), [(0, "cpu"), (1, None)])
def test_a_pilot_on_cpus_takes_no_gpu_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str | None
) -> None:
    """Ray leaves a worker that asked for none the sight of all; DeepSpeed would take the first."""
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr(loop, "Worker", lambda *_: SimpleNamespace(run=lambda: None))
    config = RunConfig.model_validate({"resources": {"pilot_gpus": gpus}})
    train_worker({"job": PilotJob(config, "model", Path("train.parquet"), 1, None, None)})
    assert os.environ.get("DS_ACCELERATOR") == accelerator
