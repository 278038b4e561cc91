"""ZeRO-3 splits each weight as it is read: two gloo workers have the losses, and the export, of a model that was whole on each."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tc_ray.config.schema import RunConfig
from tc_ray.models.pilot import load
from tc_ray.models.weights import NotFiniteError
from tc_ray.pilot import engine as engines
from tc_ray.pilot.engine import build_engine, take_step
from tc_ray.pilot.export import save_merged
from tc_ray.pilot.split import split_over_ranks
from tests.support.tiny_families import make_pilot

CASES = {
    "full": {"method": "full", "dtype": "fp32"},
    "lora": {"method": "lora", "dtype": "bf16", "lora": {"rank": 4, "dropout": 0.1}},
}
ROUNDS = 3
ROW = {"input_ids": np.array([[7, 30, 12, 90, 4]]), "lengths": np.array([5]), "target_start": np.array([2])}


def config_of(model: Path, case: str) -> RunConfig:
    pilot = {"batch_size": 4, "micro_batch_size": 2, "zero_stage": 3, "learning_rate": 1e-2, **CASES[case]}
    settings = {"model": {"pilot": str(model)}, "pilot": pilot, "resources": {"pilot_workers": 2}, "log": {"top_k": 8}}
    return RunConfig.model_validate(settings)


def whole(model_path: Path, *, dtype: torch.dtype | None, **options: Any) -> Any:
    """As every rank loaded the Pilot before: all of it, in the training dtype."""
    return load.load_pilot(model_path, dtype=dtype or whole.dtype, **options)  # type: ignore[attr-defined]


def rank_of_two(folder: Path, rank: int) -> None:
    """In a process of its own: each case the way it is, and with a model that is whole on every rank."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        config = config_of(folder / "model", case)
        found[f"{case} split"] = losses(config, folder / f"{case}-split", rank)
        whole.dtype = load.DTYPES[config.pilot.dtype]  # type: ignore[attr-defined]
        with mock.patch.object(engines, "load_pilot", whole), mock.patch.object(engines, "split_over_ranks"):
            found[f"{case} whole"] = losses(config, folder / f"{case}-whole", rank)
    (folder / f"losses-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def losses(config: RunConfig, out: Path, rank: int) -> list[float]:
    """Of this rank's rows in the first rounds; then the export."""
    engine = build_engine(config, Path(config.model.pilot), rounds=ROUNDS)
    out.mkdir(exist_ok=True)
    found = []
    for number in range(ROUNDS):
        torch.manual_seed(100 * number + rank)
        ids = torch.randint(2, 200, (2, 12))
        loss, record = engine(ids, torch.tensor([12, 9]), torch.tensor([5, 3]), 1 / 26)
        assert record is not None, "the taps must see the decoder's layers"
        engine.backward(loss)
        take_step(engine, True)
        found += [float(loss.detach()), float(record.rationale.sum())]
    save_merged(engine, config, config.model.pilot, out / "final", probe=[ROW], rank=rank)
    return found


@pytest.mark.slow
def test_two_workers_start_and_end_with_the_weights_of_a_whole_model(tmp_path: Path) -> None:
    make_pilot("llama", tmp_path / "model")
    spawned = [
        multiprocessing.get_context("spawn").Process(target=rank_of_two, args=(tmp_path, rank)) for rank in range(2)
    ]
    for process in spawned:
        process.start()
    for process in spawned:
        process.join(300)
        assert process.exitcode == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        for case in CASES:
            assert found[f"{case} split"] == found[f"{case} whole"]
            assert len(set(found[f"{case} split"])) == 2 * ROUNDS
    for case in CASES:
        files = [tmp_path / f"{case}-{how}" / "final" / "model.safetensors" for how in ("split", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    with torch.no_grad():
        module["model"].weight[1, 1] = float("nan")
    with (
        mock.patch.object(dist, "get_rank", return_value=0),
        mock.patch("deepspeed.init_distributed"),
        pytest.raises(NotFiniteError, match=r"some/place: the weight weight holds numbers"),
    ):
        split_over_ranks(module, {}, torch.float32, "some/place")
