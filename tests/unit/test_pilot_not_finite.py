"""Fault 5 in the Pilot's training: a round with a NaN or an infinity on one rank changes nothing on any, at every ZeRO stage."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tc_ray.config.schema import RunConfig
from tc_ray.models.finite import MOST_IN_A_ROW, LeftOut, NotFiniteError
from tc_ray.pilot.engine import build_engine, cosine_with_warmup, take_step
from tests.tiny_model import make_tiny_llama

KINDS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp32")]
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
        factors = [cosine_with_warmup(index, rounds=ROUNDS, warmup_ratio=0.03) for index in range(ROUNDS)]
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
