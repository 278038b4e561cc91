"""The Copilot's learner: ranks that step together, checkpoints, adapters, and what it learns."""

from __future__ import annotations

import copy
import dataclasses
import math
import multiprocessing
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tc_ray.config.training import CopilotSection
from tc_ray.copilot import checkpoint
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.learner import Learner
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.pilot.load import load_pilot
from tc_ray.models.pilot.step import PilotStep
from tc_ray.models.weights import MOST_IN_A_ROW, NotFiniteError
from tests.support.tiny_model import make_tiny_llama
from tests.support.torn_files import torn, torn_forms

STEPS = 3
EXAMPLES = 6


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


def section(**changes: Any) -> CopilotSection:
    return CopilotSection.model_validate({"dtype": "fp32", "learning_rate": 3e-3, **changes})


def make_copilot(folder: Path, seed: int = 1, output_ids: torch.Tensor | None = None, **form: Any) -> Copilot:
    torch.manual_seed(seed)
    pilot = load_pilot(folder, dtype=torch.float32)
    return Copilot.from_decoder(folder, [0, 1, 2, 3], pilot=pilot, output_ids=output_ids, **form)


def make_batch(folder: Path, chosen: slice = slice(None), seed: int = 0) -> CopilotBatch:
    """Errors of the untrained Pilot on random sequences of different lengths; `chosen` takes some of the examples."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 16, EXAMPLES)[chosen]
    starts = np.array([2, 5, 3, 1, 4, 5])[chosen]
    ids = rng.integers(2, 258, (EXAMPLES, 16))[chosen]
    step = PilotStep(load_pilot(folder, dtype=torch.float32), top_k=8).eval()
    data = [torch.from_numpy(np.ascontiguousarray(x)) for x in (ids, lengths, starts)]
    with torch.no_grad():
        out = step.measure(*data)
    assert out.record is not None
    return CopilotBatch.from_step(out.record, *data, positions="all")


def train(learner: Learner, folder: Path, steps: range, chosen: slice = slice(None)) -> list[float]:
    return [learner.step(make_batch(folder, chosen, seed=step)).loss for step in steps]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.parameters.items()}


def one_of_two(rank: int, folder: Path, meeting: Path, out: Path) -> None:
    """Runs in a process of its own: a rank with its part of every batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    learner = Learner(make_copilot(folder), section(), total_steps=10, world_size=2)
    # parts of different rows and token counts: a mean of the ranks' means would differ
    part = slice(0, EXAMPLES - 2) if rank == 0 else slice(EXAMPLES - 2, None)
    losses = train(learner, folder, range(STEPS), part)
    torch.save((losses, weights(learner)), out / f"rank{rank}.pt")
    # a step that one rank spoils is left out on both
    batch = make_batch(folder, part)
    before = weights(learner)
    bad = learner.step(poisoned(batch, "error_values", float("nan")) if rank else batch)
    assert not bad.taken and all(torch.equal(p, before[name]) for name, p in weights(learner).items())
    # a group that is restarted from a checkpoint takes the steps of one that is not
    if rank == 0:
        checkpoint.save(learner, out, Position(STEPS, 1, 1))
    dist.barrier()
    straight = train(learner, folder, range(STEPS + 1, STEPS + 3), part)
    again = Learner(make_copilot(folder, seed=9), section(), total_steps=10, world_size=2)
    checkpoint.restore(again, out)
    assert train(again, folder, range(STEPS + 1, STEPS + 3), part) == straight
    assert all(torch.equal(p, weights(learner)[name]) for name, p in weights(again).items())
    torch.save((straight, weights(again)), out / f"later{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_do_what_one_does(model_folder: Path, tmp_path: Path) -> None:
    """And leave out a step together, and go on from a checkpoint bit for bit.

    Weights after three steps: the sums run in another order (1e-7), and AdamW's first steps have the size of the
    learning rate whatever the gradient, so noise in a tiny gradient shows at up to 1e-4 of a step."""
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=one_of_two, args=(rank, model_folder, tmp_path / "meeting", tmp_path)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    learner = Learner(make_copilot(model_folder), section(), total_steps=10)
    before = weights(learner)
    losses = train(learner, model_folder, range(STEPS))
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first[0] == second[0], "the ranks report different losses"
    assert first[0] == pytest.approx(losses, rel=1e-5)
    for name, after in weights(learner).items():
        assert torch.equal(first[1][name], second[1][name]), f"{name}: the ranks drifted apart"
        moved = float((after - before[name]).abs().max())
        assert moved > 1e-4, f"{name} was not trained"
        assert float((first[1][name] - after).abs().max()) < 1e-3 * moved, name
    # another number of ranks goes on from their checkpoint: here one, with the whole batches
    alone = Learner(make_copilot(model_folder, seed=9), section(), total_steps=10)
    found, _ = checkpoint.restore(alone, tmp_path)
    assert found is not None and alone.step_count == STEPS + 1, "the step that was left out counts too"
    losses, after = torch.load(tmp_path / "later0.pt", weights_only=True)
    restored = weights(alone)
    assert train(alone, model_folder, range(STEPS + 1, STEPS + 3)) == pytest.approx(losses, rel=1e-5)
    for name, value in weights(alone).items():
        moved = float((value - restored[name]).abs().max())
        assert float((after[name] - value).abs().max()) < 1e-3 * moved, name


@pytest.mark.gpu
def test_a_gpu_takes_the_steps_of_the_cpu(model_folder: Path) -> None:
    """Losses of three steps; the sums run in another order."""
    losses = {
        device: train(
            Learner(make_copilot(model_folder), section(), total_steps=10, device=device), model_folder, range(3)
        )
        for device in ("cpu", "cuda")
    }
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert len(set(losses["cuda"])) == 3


def test_restored_learner_goes_on_as_if_never_stopped(model_folder: Path, tmp_path: Path) -> None:
    straight = Learner(make_copilot(model_folder), section(), total_steps=8)
    straight_losses = train(straight, model_folder, range(6))

    stopped = Learner(make_copilot(model_folder), section(), total_steps=8)
    train(stopped, model_folder, range(3))
    checkpoint.save(stopped, tmp_path, Position(3, 1, 7))
    train(stopped, model_folder, range(3, 4))  # lost with the process

    resumed = Learner(make_copilot(model_folder, seed=99), section(), total_steps=8)
    assert checkpoint.restore(resumed, tmp_path) == (Position(3, 1, 7), [])
    assert resumed.step_count == 3
    assert train(resumed, model_folder, range(3, 6)) == straight_losses[3:]
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_only_whole_checkpoints_count(model_folder: Path, tmp_path: Path) -> None:
    learner = Learner(make_copilot(model_folder), section(), total_steps=8)
    assert checkpoint.restore(learner, tmp_path) == (None, [])
    for step in (5, 10, 15):
        checkpoint.save(learner, tmp_path, Position(step, step // 3, step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    half_written = tmp_path / "step-000020.tmp"
    half_written.mkdir()
    (half_written / "position.json").write_text('{"step": 20, "round": 6, "version": 20}')
    assert checkpoint.restore(learner, tmp_path) == (Position(15, 5, 15), [])
    for step in (999_999, 1_000_000, 1_000_001):  # a seventh digit must not sort before six
        checkpoint.save(learner, tmp_path, Position(step, step // 3, step))
        assert checkpoint.restore(learner, tmp_path) == (Position(step, step // 3, step), [])


def test_torn_files_fall_back_to_the_checkpoint_before(model_folder: Path, tmp_path: Path) -> None:
    """Fault 7: a torn file ended each restart of the learner."""
    learner = Learner(make_copilot(model_folder), section(), total_steps=8)
    for step in (1, 2):
        checkpoint.save(learner, tmp_path, Position(step, 0, 0))
    newest = tmp_path / "step-000002"
    for name in ("complete.json", "optimizer.pt"):
        for form in torn_forms((newest / name).read_bytes()).values():
            if name == "optimizer.pt" and len(form) == (newest / name).stat().st_size:
                continue  # damage within a file of weights is for its own reader
            with torn(newest / name, form):
                found, damaged = checkpoint.restore(learner, tmp_path)
            assert found == Position(1, 0, 0)
            assert len(damaged) == 1 and "step-000002" in damaged[0]
    (newest / "complete.json").write_bytes(b"")
    for step in (3, 4):
        checkpoint.save(learner, tmp_path, Position(step, 0, 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_checkpoint_of_another_copilot_is_refused(model_folder: Path, tmp_path: Path) -> None:
    checkpoint.save(Learner(make_copilot(model_folder), section(), total_steps=8), tmp_path, Position(1, 0, 0))
    other = Learner(make_copilot(model_folder), section(method="lora"), total_steps=8)
    with pytest.raises(ValueError, match="other trainable weights"):
        checkpoint.restore(other, tmp_path)


@pytest.mark.parametrize(
    ("method", "few_tokens", "preset"),
    [
        ("full", False, None),
        ("full", True, None),
        ("lora", False, None),
        ("lora", True, None),
        ("full", False, "paper"),
        ("lora", False, "paper"),
    ],
)
def test_learns_and_exports(
    model_folder: Path, tmp_path: Path, method: str, few_tokens: bool, preset: str | None
) -> None:
    """The loss falls well below that of predicting nothing, and the exported folder predicts the same."""
    config = section(method=method, lora={"rank": 4, "dropout": 0.0}, warmup_ratio=0.0, preset=preset)
    batch = make_batch(model_folder)
    true_tokens = batch.error_ids[batch.row_mask][:, 0].unique() if few_tokens else None
    copilot = make_copilot(model_folder, output_ids=true_tokens, **config.form())
    learner = Learner(copilot, config, total_steps=60)
    start = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    results = [learner.step(batch) for _ in range(60)]
    # W_out starts near 0, so the first loss is that of f = 0
    assert results[0].loss == pytest.approx(results[0].error_size, rel=0.02)
    assert results[-1].loss < 0.75 * results[-1].error_size
    assert results[-1].learning_rate < 0.01 * results[0].learning_rate
    assert results[0].tokens == int(batch.row_mask.sum())
    for name, value in learner.model.named_parameters():
        frozen = name not in learner.parameters
        assert torch.equal(value, start[name]) == frozen, f"{name}: {'changed' if frozen else 'did not change'}"
    if method == "lora":
        assert all("lora_" in n or ".layers." not in n for n in learner.parameters)
        assert any("lora_" in n for n in learner.parameters)
    with torch.no_grad():
        expected = learner.model.eval()(batch)
        learner.export(tmp_path / "final")
        back = Copilot.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
        assert not any("lora" in name for name in back.state_dict())
        torch.testing.assert_close(back(batch), expected, rtol=1e-4, atol=1e-5)
        assert back(batch).shape == (results[0].tokens, 258)


def test_bf16_computes_nearly_the_same_loss(model_folder: Path) -> None:
    """Autocast: 8 bits of mantissa in the products, float32 in weights, loss and optimizer."""
    losses = {}
    for dtype in ("fp32", "bf16"):
        learner = Learner(make_copilot(model_folder), section(dtype=dtype), total_steps=10)
        losses[dtype] = train(learner, model_folder, range(5))
        assert all(p.dtype == torch.float32 for p in learner.parameters.values())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_clipping_is_of_the_gradient_of_the_loss(model_folder: Path) -> None:
    """The norm that `max_grad_norm` bounds is that of d RMSE, not of the sum of squares, which grows with the batch."""
    learner = Learner(make_copilot(model_folder), section(max_grad_norm=1e9), total_steps=10)
    batch = make_batch(model_folder)
    learner.step(batch)
    got = torch.cat([p.grad.flatten() for p in learner.parameters.values()])
    copilot = make_copilot(model_folder)
    f = copilot(batch)
    rows = batch.row_mask
    dense = torch.zeros_like(f).scatter_add(1, batch.error_ids[rows], batch.error_values[rows])
    (f - dense).square().sum(1).mean().sqrt().backward()
    wanted = torch.cat([p.grad.flatten() for p in copilot.parameters() if p.requires_grad])
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def poisoned(batch: CopilotBatch, field: str, value: float) -> CopilotBatch:
    changed = getattr(batch, field).clone()
    changed.view(-1)[0] = value
    return dataclasses.replace(batch, **{field: changed})


@pytest.mark.parametrize("field", ["error_values", "rationale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(model_folder: Path, field: str, value: float) -> None:
    """Fault 5: one NaN among 756 values turned all parameters into NaN for good; now such a step is left out and counted."""
    learner = Learner(make_copilot(model_folder), section(), total_steps=20)
    batch = make_batch(model_folder)
    bad = poisoned(batch, field, value)
    first = learner.step(bad)
    assert not first.taken and learner.step_count == 1
    learner.step(batch)
    before, state = weights(learner), copy.deepcopy(learner.optimizer.state_dict()["state"])
    rates = [learner.step(bad).learning_rate, learner.step(bad).learning_rate]
    assert rates[0] > rates[1], "the schedule goes by steps, taken or not"
    assert all(torch.equal(p, before[name]) for name, p in learner.parameters.items())
    for number, kept in learner.optimizer.state_dict()["state"].items():
        assert all(torch.equal(kept[name], state[number][name]) for name in kept)
    after = learner.step(batch)
    assert after.taken and math.isfinite(after.loss)
    assert learner.left_out.count == 3
    assert not all(torch.equal(p, before[name]) for name, p in learner.parameters.items())


def test_too_many_steps_in_a_row_end_the_learner(model_folder: Path) -> None:
    """Fault 5: spoilt weights make every step so: that is one clear failure, not a Copilot of NaN."""
    learner = Learner(make_copilot(model_folder), section(), total_steps=20)
    bad = poisoned(make_batch(model_folder), "error_values", float("nan"))
    with pytest.raises(NotFiniteError, match=r"the Copilot: loss or gradient was not finite 10 times.*learning_rate"):
        for _ in range(20):
            learner.step(bad)
    assert learner.left_out.count == MOST_IN_A_ROW


def test_checkpoints_and_exports_are_finite(model_folder: Path, tmp_path: Path) -> None:
    """Fault 5: spoilt weights are neither stored nor published, the checkpoint before stands."""
    learner = Learner(make_copilot(model_folder), section(), total_steps=20)
    learner.step(make_batch(model_folder))
    checkpoint.save(learner, tmp_path, Position(1, 1, 1))
    name, parameter = next(iter(learner.parameters.items()))
    with torch.no_grad():
        parameter.view(-1)[0] = float("inf")
    with pytest.raises(NotFiniteError, match=f"after step 1: the weight {re.escape(name)} "):
        checkpoint.save(learner, tmp_path, Position(2, 1, 1))
    with pytest.raises(NotFiniteError):
        learner.export(tmp_path / "final")
    assert not (tmp_path / "final").exists()
    other = Learner(make_copilot(model_folder), section(), total_steps=20)
    assert checkpoint.restore(other, tmp_path) == (Position(1, 1, 1), [])


@pytest.mark.parametrize("torn", ["complete.json", "trainable.safetensors", "optimizer.pt"])
def test_a_torn_newest_checkpoint_is_passed_over(model_folder: Path, tmp_path: Path, torn: str) -> None:
    """Faults 6 and 7: whichever file of it was cut off, the checkpoint before is taken."""
    learner = Learner(make_copilot(model_folder), section(), total_steps=20)
    for step in (1, 2):
        newest = checkpoint.save(learner, tmp_path, Position(step, step, step))
    content = (newest / torn).read_bytes()
    (newest / torn).write_bytes(content[: len(content) // 2])
    assert checkpoint.restore(learner, tmp_path)[0] == Position(1, 1, 1)


def test_an_export_that_is_not_the_trained_copilot_is_not_published(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 16 for the Copilot: whatever goes wrong between merging and loading is found before the folder appears."""
    from tc_ray.models.copilot import probe

    learner = Learner(make_copilot(model_folder), section(method="lora", lora={"rank": 4}), total_steps=20)
    for _ in range(3):
        learner.step(make_batch(model_folder))

    def forgets_a_layer(folder: Path) -> Copilot:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["stack.layers.1.mlp.down_proj.weight"] = tensors["stack.layers.0.mlp.down_proj.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        return Copilot.from_pretrained(folder)

    monkeypatch.setattr(
        probe, "Copilot", type("Spoilt", (), {"from_pretrained": staticmethod(lambda f, **_: forgets_a_layer(f))})
    )
    with pytest.raises(probe.ExportMismatchError, match="the exported Copilot is not the trained one"):
        learner.export(tmp_path / "final")
    assert not (tmp_path / "final").exists()
