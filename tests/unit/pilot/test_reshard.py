"""A checkpoint of three workers goes on with two at another ZeRO stage: the same numbers when it is loaded, the same rounds after it.

Real workers and engines in processes of their own, without Ray. What an engine holds is read through DeepSpeed's own functions.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tc_ray.pilot.checkpoint import PilotCheckpoint, latest_checkpoint, load_checkpoint
from tc_ray.pilot.loop import PilotJob, Worker
from tests.support.tiny_model import make_tiny_llama
from tests.support.tiny_run import tiny_config

KINDS: dict[str, dict[str, Any]] = {
    "full": {"pilot__method": "full", "pilot__dtype": "fp32"},
    "lora": {"pilot__method": "lora", "pilot__dtype": "fp32", "pilot__lora": {"rank": 3, "dropout": 0.0}},
    "bf16": {"pilot__method": "full", "pilot__dtype": "bf16"},
}
CHANGES = {
    "quick": [("full", 1, 3), ("lora", 3, 0), ("bf16", 0, 2), ("bf16", 2, 1)],
    "rest": [
        ("full", 3, 1),
        ("full", 0, 2),
        ("full", 2, 2),
        ("lora", 1, 3),
        ("bf16", 2, 0),
        ("bf16", 3, 2),
        ("bf16", 1, 3),
    ],
}
"""Kind, ZeRO stage of the checkpoint, and the one that it is loaded at. In the quick ones each stage is left and entered."""
CASES = [
    pytest.param(part, *change, marks=[pytest.mark.slow] if part == "rest" else [])
    for part, changes in CHANGES.items()
    for change in changes
]
BEFORE, AFTER = 3, 6
"""Rounds up to the checkpoint, and up to the end."""
State = dict[str, tuple[torch.Tensor, ...]]


def run_of(folder: Path, kind: str, stage: int, made_at: int, workers: int) -> Worker:
    """One rank over the run folder of a kind whose checkpoint is made at stage `made_at`; this process is of the group."""
    settings = {
        "run__folder": folder / f"{kind}-{made_at}",
        "log__enabled": False,
        "pilot__batch_size": 12,
        "pilot__micro_batch_size": 2,
        "pilot__learning_rate": 1e-2,
        "pilot__weight_decay": 0.1,
        "pilot__zero_stage": stage,
        "resources__pilot_workers": workers,
    }
    config = tiny_config(folder, **settings, **KINDS[kind])
    heard: list[Any] = []
    tracker = SimpleNamespace(heard=heard, event=SimpleNamespace(remote=lambda *event: heard.append(event)))
    tracker.waiting = SimpleNamespace(remote=lambda *_: None)
    job = PilotJob(config, config.model.pilot, folder / "train.parquet", AFTER, None, tracker)
    return Worker(job, dist.get_rank(), workers)


def state_of(engine: Any) -> State:
    """fp32 weights, both moments and the step of every trained parameter, whole (collective)."""
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
    )

    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    found = {}
    if engine.zero_optimization_stage() == 0:
        groups = getattr(engine.optimizer, "fp32_groups", [list(trained.values())])
        for name, master in zip(trained, groups[0], strict=True):
            own = engine.basic_optimizer.state[master]
            found[name] = (
                master.detach().clone(),
                own["exp_avg"].clone(),
                own["exp_avg_sq"].clone(),
                own["step"].clone(),
            )
        return found
    zero = engine.optimizer
    steps = {float(own["step"]) for own in zero.optimizer.state.values()}
    assert len(steps) == 1
    if engine.zero_optimization_stage() < 3:
        lazy_init_hp_params_optimizer_state(
            zero.bit16_groups[0], zero.single_partition_of_fp32_groups[0], zero.optimizer.state
        )
    for name, p in trained.items():
        moments = (safe_get_full_optimizer_state(p, moment).clone() for moment in ("exp_avg", "exp_avg_sq"))
        found[name] = (safe_get_full_fp32_param(p).clone(), *moments, torch.tensor(steps.pop() if steps else 0.0))
        steps.add(float(found[name][3]))
    return found


def model_of(engine: Any) -> dict[str, torch.Tensor]:
    """Trained weights as the forward pass reads them (collective)."""
    import deepspeed

    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], modifier_rank=None):
            if p.requires_grad:
                found[name] = p.detach().clone()
    return found


def rounds_of(worker: Worker, first: int, last: int) -> list[float]:
    return [worker._round(number)["loss"] for number in range(first, last + 1)]


def three(folder: Path, made: dict[Any, Any], part: str) -> None:
    """Every kind and stage: three rounds and a checkpoint, and then, as a run without a change, three more."""
    for kind, stage in sorted({(kind, stage) for kind, stage, _ in CHANGES[part]}):
        worker = run_of(folder, kind, stage, stage, 3)
        rounds_of(worker, 1, BEFORE)
        worker._checkpoint(BEFORE, wait=True)
        at = state_of(worker.engine), model_of(worker.engine)
        losses = rounds_of(worker, BEFORE + 1, AFTER)
        made[kind, stage] = (*at, losses, state_of(worker.engine))


def two(folder: Path, made: dict[Any, Any], part: str) -> None:
    """Every change: load and go on."""
    for kind, old, stage in CHANGES[part]:
        worker = run_of(folder, kind, stage, old, 2)
        assert worker._restore() == BEFORE
        at = state_of(worker.engine), model_of(worker.engine)
        assert worker.engine.global_steps == BEFORE
        losses = rounds_of(worker, BEFORE + 1, AFTER)
        heard: Any = worker.job.tracker
        made[kind, old, stage] = (*at, losses, state_of(worker.engine), heard.heard)


CHAIN = {4: (1, 2), 2: (3, 4), 3: (0, AFTER)}
"""Workers: their stage, and the round of the checkpoint that they leave."""


def chain(folder: Path, made: dict[Any, Any]) -> None:
    """One start of a run that changes at each of them."""
    workers = dist.get_world_size()
    stage, last = CHAIN[workers]
    worker = run_of(folder, "full", stage, 9, workers)
    first = worker._restore() + 1
    made["losses"] = rounds_of(worker, first, last)
    worker._checkpoint(last, wait=True)
    made["end"] = state_of(worker.engine)


def alone(folder: Path, made: dict[Any, Any]) -> None:
    """The run of one worker that never changes."""
    worker = run_of(folder, "full", 0, 8, 1)
    made["losses"] = rounds_of(worker, 1, AFTER)
    made["end"] = state_of(worker.engine)


def rank_of(work: Any, rank: int, workers: int, folder: Path, *more: str) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    meeting = folder / f"meeting-{workers}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    made: dict[Any, Any] = {}
    work(folder, made, *more)
    if rank == 0:
        torch.save(made, folder / f"{work.__name__}.pt")
    dist.destroy_process_group()


def group(work: Any, workers: int, folder: Path, *more: str) -> dict[Any, Any]:
    """What `work` left in the first of so many ranks."""
    fork = multiprocessing.get_context("forkserver")
    # imported once, not by each rank
    fork.set_forkserver_preload(["deepspeed", "transformers.models.llama", "tc_ray.pilot.loop"])
    ranks = [
        fork.Process(target=rank_of, args=(work, rank, workers, folder, *more), daemon=True) for rank in range(workers)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0] * workers
    found: dict[Any, Any] = torch.load(folder / f"{work.__name__}.pt")
    return found


def write_inputs(folder: Path) -> None:
    """The model and the rows of `run_of`."""
    make_tiny_llama(folder / "model", layers=1)
    random = np.random.default_rng(0)
    rows = [random.integers(2, 258, size).tolist() for size in random.integers(6, 14, 24)]
    table = {"sample_id": range(24), "input_ids": pa.array(rows, pa.list_(pa.int32())), "target_start": [3] * 24}
    table["earlier_targets"] = pa.nulls(24, pa.list_(pa.int32()))
    pq.write_table(pa.table(table), folder / "train.parquet")


class Runs:
    """What three workers made, then what two made of it: of each part of CHANGES once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {}

    def of(self, part: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
        if part not in self._made:
            folder = self._root / part
            write_inputs(folder)
            self._made[part] = group(three, 3, folder, part), group(two, 2, folder, part)
            kind, stage, _ = CHANGES[part][0]
            whole = latest_checkpoint(folder / f"{kind}-{stage}" / "pilot" / "checkpoints")
            assert whole is not None and (whole.world_size, whole.zero_stage) == (3, stage), "loading wrote nothing"
        return self._made[part]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("reshard"))


@pytest.mark.parametrize(("part", "kind", "old", "stage"), CASES)
def test_what_is_loaded_is_what_was_saved(part: str, kind: str, old: int, stage: int, runs: Runs) -> None:
    """Bit for bit: weights, moments and steps, each as a whole; and the weights that the forward pass reads."""
    made = runs.of(part)
    (saved, model, *_), (loaded, read, *_, events) = made[0][kind, old], made[1][kind, old, stage]
    assert loaded.keys() == saved.keys() and len(saved) >= 10
    for name, values in saved.items():
        assert all(torch.equal(a, b) for a, b in zip(values, loaded[name], strict=True)), name
    assert {value.dtype for value in read.values()} == {torch.bfloat16 if kind == "bf16" else torch.float32}
    assert all(torch.equal(model[name], value) for name, value in read.items())
    assert events == [
        ("resume", f"round-000003 of 3 worker(s) at ZeRO stage {old} is divided anew: 2 at {stage}"),
    ]


@pytest.mark.parametrize(("part", "kind", "old", "stage"), CASES)
def test_the_rounds_after_it_are_those_of_a_run_without_the_change(
    part: str, kind: str, old: int, stage: int, runs: Runs
) -> None:
    """Up to the order in which gradients are added, which in bf16 is a part in 256."""
    made = runs.of(part)
    (at, _, losses, end), (*_, new_losses, new_end, _) = made[0][kind, old], made[1][kind, old, stage]
    exact = kind != "bf16"
    assert new_losses == pytest.approx(losses, rel=1e-5 if exact else 2e-2)
    for name, (weights, first, second, step) in end.items():
        new_weights, new_first, new_second, new_step = new_end[name]
        assert float(step) == float(new_step)
        moved = float((weights - at[name][0]).abs().mean())
        assert moved > 1e-3, "nothing was trained: the comparison proves little"
        assert float((weights - new_weights).abs().mean()) < moved * (1e-3 if exact else 0.5), name
        if exact:
            torch.testing.assert_close(new_first, first, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(new_second, second, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_then_two_then_three_workers_train_what_one_does(tmp_path: Path) -> None:
    """At ZeRO stages 1, 3 and 0, with uneven micro-batches where the rows do not divide."""
    write_inputs(tmp_path)
    one = group(alone, 1, tmp_path)
    starts = [group(chain, workers, tmp_path) for workers in CHAIN]
    assert [len(start["losses"]) for start in starts] == [2, 2, 2]
    assert [loss for start in starts for loss in start["losses"]] == pytest.approx(one["losses"], rel=1e-5)
    for name, (weights, *_, step) in one["end"].items():
        changed, *_, changed_step = starts[-1]["end"][name]
        assert float(step) == float(changed_step) == AFTER
        assert float((weights - changed).abs().mean()) < 1e-4, name


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    """The same marker, but the files name other parameters than the engine has."""
    folder = tmp_path / "round-000005"
    (folder / "state").mkdir(parents=True)
    model = {"module": {}, "param_shapes": [{"other": (2, 3)}]}
    torch.save(model, folder / "state" / "mp_rank_00_model_states.pt")
    part = {
        "base_optimizer_state": {"state": {}, "param_groups": [{}]},
        "single_partition_of_fp32_groups": [torch.zeros(6)],
    }
    torch.save({"optimizer_state_dict": part}, folder / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    engine = SimpleNamespace(module=torch.nn.Linear(2, 3), bfloat16_enabled=lambda: False)
    with pytest.raises(ValueError, match=r"round-000005/state holds other trained weights .*use a new run\.folder"):
        load_checkpoint(engine, PilotCheckpoint(folder, 5, 1, 1), world_size=2, zero_stage=1)
