"""Parts of the Pilot that need no worker: checkpoints that count, the schedule, batch arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.models.schedule import rate_factor
from tc_ray.pilot.checkpoint import PilotCheckpoint, latest_checkpoint, load_checkpoint, mark_complete
from tc_ray.pilot.engine import deepspeed_config


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


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_checkpoint_of_another_topology_is_refused(tmp_path: Path, world_size: int, stage: int) -> None:
    checkpoint = PilotCheckpoint(tmp_path, 5, 2, 1)
    with pytest.raises(ValueError, match=r"made by 2 workers at ZeRO stage 1.*Set resources\.pilot_workers"):
        load_checkpoint(None, checkpoint, world_size=world_size, zero_stage=stage)


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
