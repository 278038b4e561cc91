"""Fault 5 in the Pilot's training: a round with a NaN or an infinity on one rank changes nothing on any, at every ZeRO stage."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tc_ray.config.schema import RunConfig
from tc_ray.files import is_whole
from tc_ray.models.schedule import rate_factor
from tc_ray.models.weights import MOST_IN_A_ROW, LeftOut, NotFiniteError
from tc_ray.pilot.checkpoint import mark_complete, save_files
from tc_ray.pilot.engine import build_engine, take_step
from tc_ray.pilot.loop import PilotJob, Worker
from tests.support.tiny_model import make_tiny_llama

KINDS = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
ROUNDS = 6
BAD = {2: "loss", 4: "gradient"}
"""Rounds that rank 1 spoils: a loss of NaN, or an infinite gradient under a loss that looks well."""


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            found[name] = parameter.detach().float().clone()
    return found


def one_of_two(rank: int, model: Path, meeting: Path, out: Path) -> None:
    """In a process of its own: two micro-batches a round, all rounds, for every kind of engine."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    made = {}
    for stage, dtype in KINDS:
        pilot = {"method": "full", "dtype": dtype, "zero_stage": stage, "batch_size": 4, "micro_batch_size": 1}
        config = RunConfig.model_validate(
            {"model": {"pilot": str(model)}, "pilot": pilot, "resources": {"pilot_workers": 2}, "log": {"top_k": 4}}
        )
        engine = build_engine(config, model, rounds=ROUNDS)
        spoilt = ""

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf") if spoilt == "gradient" else gradient  # noqa: B023 - read in its own round

        next(engine.module.parameters()).register_hook(spoil)
        weights, rates, taken = [weights_of(engine)], [], []
        for number in range(1, ROUNDS + 1):
            spoilt = BAD.get(number, "") if rank else ""
            rates.append(engine.get_lr()[0])
            total = torch.zeros(())
            for micro in range(2):
                ids = torch.randint(2, 258, (1, 8), generator=torch.Generator().manual_seed(10 * number + micro + rank))
                loss, _ = engine(ids, torch.tensor([8]), torch.tensor([3]), 0.2)
                loss = loss * float("nan") if spoilt == "loss" else loss
                engine.backward(loss)
                total += loss.detach().float()
                if micro == 0:
                    engine.step()
            dist.all_reduce(total)
            taken.append(take_step(engine, bool(total.isfinite())))
            weights.append(weights_of(engine))
        made[stage, dtype] = (weights, rates, taken)
    torch.save(made, out / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("two")
    model = make_tiny_llama(folder / "model", layers=1)
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=one_of_two, args=(rank, model, folder / "meeting", folder), daemon=True) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_that_one_rank_spoils_changes_nothing_on_any(kind: tuple[int, str], made: list[dict[Any, Any]]) -> None:
    """Fault 5: the update of a round with a loss or gradient that is not finite is left out, on all ranks alike."""
    for rank in made:
        weights, rates, taken = rank[kind]
        assert taken == [number not in BAD for number in range(1, ROUNDS + 1)]
        for number in range(1, ROUNDS + 1):
            before, after = weights[number - 1], weights[number]
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same == (number in BAD), number
            assert all(bool(value.isfinite().all()) for value in after.values())
        # the schedule goes by rounds, whatever was left out
        factors = [rate_factor(index, steps=ROUNDS, warmup_ratio=0.03, schedule="cosine") for index in range(ROUNDS)]
        assert rates == pytest.approx([3e-4 * factor for factor in factors])
    first, second = (rank[kind][0][-1] for rank in made)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_so_many_rounds_in_a_row_are_left_out() -> None:
    """Fault 5: weights that are spoilt make every round so; that ends with one clear error."""
    counted = LeftOut("the Pilot", "do this")
    assert [counted.add(taken, 1.0) for taken in (True, False, False, True, False)] == [False, True, False, False, True]
    assert counted.count == 3
    counted.add(True, 1.0)
    for _ in range(MOST_IN_A_ROW - 1):
        counted.add(False, float("nan"))
    with pytest.raises(NotFiniteError, match=r"the Pilot: loss or gradient was not finite 10 times in a row.*do this"):
        counted.add(False, float("nan"))


class Heard:
    """The tracker actor of a job, as a list of what was said to it."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: self.said.append((name, *given)))


def a_worker_without_ray(model: Path, meeting: Path, folder: Path) -> None:
    """In a process of its own: a sound run with checkpoints, one of them spoilt, then a run that cannot learn."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    rows = [list(range(5, 13)), list(range(20, 28)), list(range(40, 48)), list(range(60, 68))]
    table = {"sample_id": range(4), "input_ids": pa.array(rows, pa.list_(pa.int32())), "target_start": [3] * 4}
    table["earlier_targets"] = pa.nulls(4, pa.list_(pa.int32()))
    pq.write_table(pa.table(table), folder / "train.parquet")

    def worker(name: str, **pilot: Any) -> tuple[Worker, Heard]:
        settings = {
            "method": "full",
            "dtype": "fp32",
            "batch_size": 2,
            "micro_batch_size": 2,
            "epochs": 20,
            "zero_stage": 0,
        }
        sections = {"run": {"folder": folder / name}, "log": {"enabled": False}, "model": {"pilot": str(model)}}
        config = RunConfig.model_validate({**sections, "pilot": settings | pilot})
        heard = Heard()
        job = PilotJob(config, model, folder / "train.parquet", pilot.pop("rounds", 4), None, heard)
        return Worker(job, 0, 1), heard

    found: dict[str, Any] = {}
    worker("sound", checkpoint_every_rounds=2)[0].run()
    found["whole"] = is_whole(folder / "sound" / "pilot" / "final")
    again, _ = worker("sound", checkpoint_every_rounds=2)
    with torch.no_grad():
        next(again.engine.module.parameters()).view(-1)[3] = float("nan")
    try:
        again._checkpoint(4, wait=True)
    except NotFiniteError as error:
        found["checkpoint"] = str(error)
    save_files(again.engine, again.checkpoints, 6)
    mark_complete(again.checkpoints / "round-000006", round_number=6, world_size=1, zero_stage=0, keep=2)
    try:
        worker("sound", checkpoint_every_rounds=2)[0].run()
    except NotFiniteError as error:
        found["restore"] = str(error)
    lost, heard = worker("lost", learning_rate=1e30, checkpoint_every_rounds=100)
    lost.job = dataclasses.replace(lost.job, rounds=30)
    try:
        lost.run()
    except NotFiniteError as error:
        found["lost"] = str(error)
    found["said"] = heard.said
    torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def test_a_run_that_meets_them(tmp_path: Path) -> None:
    """Fault 5, in the worker itself: a checkpoint is neither made of spoilt weights nor loaded with them; rounds that are left out
    are counted, told once, and end the run when nothing else comes."""
    model = make_tiny_llama(tmp_path / "model", layers=1)
    process = multiprocessing.get_context("spawn").Process(
        target=a_worker_without_ray, args=(model, tmp_path / "meeting", tmp_path), daemon=True
    )
    process.start()
    process.join(240)
    assert process.exitcode == 0
    found = torch.load(tmp_path / "found.pt")
    assert found["whole"]
    assert "the Pilot after round 4 holds weights that are not finite (model." in found["checkpoint"]
    assert "round-000006: the checkpoint holds weights that are not finite" in found["restore"]
    assert "remove the folder to resume from the one before" in found["restore"]
    assert f"not finite {MOST_IN_A_ROW} times in a row" in found["lost"] and "pilot.learning_rate" in found["lost"]
    events = [said for said in found["said"] if said[0] == "event"]
    assert len(events) == 1 and events[0][1] == "not finite" and events[0][2].startswith("round 2: ")
    counted = [said[2]["left_out_rounds"] for said in found["said"] if said[0] == "pilot"]
    assert counted == [float(number) for number in range(MOST_IN_A_ROW)]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("spoilt", [False, True])
def test_padding_of_zero_3_is_no_weight(rank: int, spoilt: bool) -> None:
    """Fault 5: DeepSpeed never writes the end of the last part; NaN that lay in memory there ended a sound run at its checkpoint."""
    numel, part = 4, 3  # of three ranks, as DeepSpeed divides: the second has one number, the third none
    held = max(0, min(part, numel - rank * part))
    parameter: Any = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_zero_partition_rank = torch.ones(part), numel, rank
    parameter.ds_tensor[held:] = float("nan")
    if spoilt:
        parameter.ds_tensor[: min(1, held)] = float("nan")
    module = SimpleNamespace(named_parameters=lambda: [("weight", parameter)])
    worker: Any = SimpleNamespace(engine=SimpleNamespace(module=module), _largest=float)  # one rank
    if spoilt and held:
        with pytest.raises(NotFiniteError, match=r"not finite \(weight\)"):
            Worker._check_weights(worker, "the Pilot", "do this")
    else:
        Worker._check_weights(worker, "the Pilot", "do this")
