"""Test, then train: error ratios against dense errors, the order of measuring and training, restarts, ranks, memorised logs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.copilot import held_out
from tc_ray.copilot.batch import batch_from_records
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.copilot.checkpoint import Position, latest
from tc_ray.copilot.held_out import ErrorRatio, HeldOut
from tc_ray.copilot.learner import Learner
from tc_ray.copilot.training import train
from tc_ray.data.prepared.batches import collate
from tc_ray.mistakelog.rows.records import Records
from tc_ray.models.copilot import Copilot
from tc_ray.models.pilot.load import load_pilot
from tc_ray.models.pilot.step import PilotStep
from tc_ray.pilot.record import to_records
from tests.support.mistakelog_samples import random_records
from tests.support.tiny_model import make_tiny_llama

ROUNDS, ROWS, PER_ROUND, BURST = 12, 6, 2, 3
GRID = [0.0, 0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings measure more often than real ones, over a shorter window."""
    monkeypatch.setattr(held_out, "EVERY_STEPS", 5)
    monkeypatch.setattr(held_out, "WINDOW", 3)


def config(**copilot: Any) -> RunConfig:
    section = {"dtype": "fp32", "learning_rate": 3e-3, "batch_size": ROWS, "steps_per_round": PER_ROUND, **copilot}
    return RunConfig.model_validate({"copilot": section, "fusion": {"lam_grid": GRID}})


def make_rounds(folder: Path) -> list[Records]:
    """Errors of an untrained Pilot on sequences of unlike lengths; of each round one sample was seen before."""
    step, rng = PilotStep(load_pilot(folder, dtype=torch.float32), top_k=8).eval(), np.random.default_rng(0)
    rounds = []
    for number in range(1, ROUNDS + 1):
        rows = [
            {
                "input_ids": rng.integers(2, 258, rng.integers(7, 14)).tolist(),
                "target_start": int(rng.integers(1, 6)),
                "sample_id": 100 * number + row,
            }
            for row in range(ROWS)
        ]
        batch = collate(rows, 0)
        with torch.no_grad():
            record = step.measure(
                *(torch.from_numpy(batch[n]) for n in ("input_ids", "lengths", "target_start"))
            ).record
        assert record is not None
        seen = np.array([0] * (ROWS - 1) + [1], np.int16)
        rounds.append(to_records(record, batch, seen, LogSection(top_k=8), round=number, rank=0, attempt=1)[0])
    return rounds


class Noted(RoundBuffer):
    """Keeps what was drawn: ("train" or "test", the records)."""

    def __init__(self, rounds: int) -> None:
        super().__init__(rounds)
        self.drawn: list[tuple[str, Records]] = []

    def draw(self, count: int, seed: tuple[int, ...]) -> Records:
        self.drawn.append(("train", super().draw(count, seed)))
        return self.drawn[-1][1]

    def sample(self, *arguments: Any, **given: Any) -> Records | None:
        found = super().sample(*arguments, **given)
        if found is not None:
            self.drawn.append(("test", found))
        return found


class Stored:
    """A feed whose rounds come some at a time, as those of a growing log."""

    version = 1

    def __init__(self, rounds: list[Records]) -> None:
        self.buffer, self._rounds, self._at = Noted(8), rounds, 0
        self.rounds = ROUNDS

    def rounds_for(self, step: int) -> int:
        while self._at * PER_ROUND <= step and self._at < len(self._rounds):
            for number in range(self._at, min(self._at + BURST, len(self._rounds))):
                self.buffer.add(f"file{number:03}", self._rounds[number])
            self._at += BURST
        return min(self._at, len(self._rounds))


def make_learner(folder: Path, settings: RunConfig, world_size: int = 1) -> Learner:
    torch.manual_seed(1)
    pilot = load_pilot(folder, dtype=torch.float32)
    ids = torch.arange(3, 200)
    copilot = Copilot.from_decoder(folder, [0, 1, 2, 3], pilot=pilot, output_ids=ids)
    return Learner(copilot, settings.copilot, total_steps=ROUNDS * PER_ROUND, world_size=world_size)


def run(
    folder: Path,
    rounds: list[Records],
    out: Path,
    settings: RunConfig,
    measured: Callable[[Learner, Stored, ErrorRatio], None] = lambda *_: None,
    report: Callable[..., None] = lambda *_: None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[list[ErrorRatio], Stored, dict[str, torch.Tensor]]:
    """A training; its ratios, its feed, and the trained weights."""
    learner, feed = make_learner(folder, settings, world_size), Stored(rounds)
    ratios: list[ErrorRatio] = []

    def take(found: ErrorRatio) -> None:
        ratios.append(found)
        measured(learner, feed, found)

    train(learner, feed, settings, out, report=report, measured=take, rank=rank)
    return ratios, feed, {name: p.detach().clone() for name, p in learner.parameters.items()}


@torch.no_grad()
def dense_sums(copilot: Copilot, records: Records) -> tuple[dict[float, float], float]:
    """Sum of |l - lam f|^2 by lambda, and of |l|^2, over [N, V] tensors."""
    batch = batch_from_records(records)
    f = copilot(batch).double()
    rows = batch.row_mask
    errors = torch.zeros_like(f).scatter_add(1, batch.error_ids[rows], batch.error_values[rows].double())
    return {lam: float((errors - lam * f).square().sum()) for lam in GRID}, float(errors.square().sum())


def test_ratios_are_those_of_dense_errors(model_folder: Path, tmp_path: Path) -> None:
    """With the weights before the step, over the newest three measurements."""
    windows: list[list[tuple[dict[float, float], float]]] = []

    def check(learner: Learner, feed: Stored, found: ErrorRatio) -> None:
        (kind, new), (other_kind, old) = feed.buffer.drawn[-2:]
        assert kind == other_kind == "test"
        windows.append([dense_sums(learner.copilot, records) for records in (new, old)])
        sums = [list(zip(*windows[-3:], strict=True))[side] for side in (0, 1)]
        for lam in GRID:
            expected = sum(by_lam[lam] for by_lam, _ in sums[0]) / sum(size for _, size in sums[0])
            assert found.by_lam[lam] == pytest.approx(expected, rel=1e-5)
        in_sample = [sum(by_lam[lam] for by_lam, _ in sums[1]) / sum(size for _, size in sums[1]) for lam in GRID]
        assert found.in_sample == pytest.approx(min(in_sample), rel=1e-5)
        assert found.best == min(found.by_lam.values()) and found.by_lam[found.lam] == found.best

    ratios, _, _ = run(model_folder, make_rounds(model_folder), tmp_path, config(), check)
    assert len(ratios) >= 3 and len({ratio.by_lam[1.0] for ratio in ratios}) == len(ratios)
    assert min(ratio.in_sample for ratio in ratios) < 0.99, "the Copilot has learned nothing: little is compared"


def test_records_are_measured_before_a_batch_can_hold_them(model_folder: Path, tmp_path: Path) -> None:
    """Of first-seen samples only. Measured after the step, or of any round held, they would be found in a batch."""
    ratios, feed, _ = run(model_folder, make_rounds(model_folder), tmp_path, config())
    trained: set[int] = set()
    newest, held_out_draws = 0, 0
    for kind, records in feed.buffer.drawn:
        ids = set(records.sample_id.tolist())
        if kind == "train":
            trained |= ids
            newest = max(newest, *records.round.tolist())
        elif records.round.min() > newest:
            held_out_draws += 1
            assert not ids & trained and not records.seen.any() and len(ids) == len(records)
        else:
            assert ids & trained
    assert held_out_draws == len(ratios) >= 3
    counts = [ratio.records for ratio in ratios]
    assert counts[0] <= ROWS and max(counts) <= 3 * ROWS
    assert all(b.step - a.step >= 5 for a, b in pairwise(ratios))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_measuring_leaves_training_as_it_is(
    model_folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters have dropout: neither the mode nor the random numbers may be changed. Twice the same, bit for bit."""
    rounds, settings = make_rounds(model_folder), config(method=method, lora={"rank": 4, "dropout": 0.5})
    first, _, weights = run(model_folder, rounds, tmp_path / "first", settings)
    again, _, weights_again = run(model_folder, rounds, tmp_path / "again", settings)
    monkeypatch.setattr(held_out, "EVERY_STEPS", 10**9)
    none, _, unmeasured = run(model_folder, rounds, tmp_path / "none", settings)
    assert first == again and first and not none
    for name, value in weights.items():
        assert torch.equal(value, weights_again[name]) and torch.equal(value, unmeasured[name]), name


class Cut(Exception):
    pass


def test_a_restart_measures_what_was_still_to_be_measured(model_folder: Path, tmp_path: Path) -> None:
    rounds, settings = make_rounds(model_folder), config(checkpoint_every_steps=8)
    straight, _, _ = run(model_folder, rounds, tmp_path / "straight", settings)
    before: list[ErrorRatio] = []

    def cut(at: Position, *_: Any) -> None:
        if at.step == 13:
            raise Cut

    with pytest.raises(Cut):
        run(model_folder, rounds, tmp_path / "cut", settings, lambda *given: before.append(given[2]), cut)
    after, _, _ = run(model_folder, rounds, tmp_path / "cut", settings)
    assert after and after[0].step >= 8
    assert [ratio for ratio in before if ratio.step < 8] + after == straight


def one_of_two(rank: int, folder: Path, meeting: Path, out: Path) -> None:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    held_out.EVERY_STEPS, held_out.WINDOW = 5, 3
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    ratios, _, _ = run(folder, make_rounds(folder), out / "two", config(), rank=rank, world_size=2)
    torch.save([vars(ratio) for ratio in ratios], out / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_learners_measure_what_one_does(model_folder: Path, tmp_path: Path) -> None:
    """Both the same; against one, sums run in another order."""
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=one_of_two, args=(rank, model_folder, tmp_path / "meeting", tmp_path)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    ratios, _, _ = run(model_folder, make_rounds(model_folder), tmp_path / "one", config())
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second and len(first) == len(ratios) >= 3
    for found, wanted in zip(first, ratios, strict=True):
        assert (found["step"], found["round"], found["records"]) == (wanted.step, wanted.round, wanted.records)
        assert found["by_lam"] == pytest.approx(wanted.by_lam, rel=1e-4)
        assert found["in_sample"] == pytest.approx(wanted.in_sample, rel=1e-4)


def test_samples_seen_before_are_not_held_out(model_folder: Path, tmp_path: Path) -> None:
    """A second epoch says nothing new."""
    rounds = make_rounds(model_folder)
    rounds = [*rounds[:6], *(replace(r, seen=np.ones_like(r.seen)) for r in rounds[6:])]
    ratios, _, _ = run(model_folder, rounds, tmp_path, config())
    assert ratios and max(ratio.round for ratio in ratios) == 6


class Said:
    """A learner that gives these products: gains at lambda 1 on new and on own records."""

    world_size = 1

    def __init__(self, new: float, old: float) -> None:
        self.gains = new, old

    def inner_products(self, batches: list[Any]) -> list[list[float]]:
        return [[4.0, 4.0 * gain, 4.0 * gain] for gain in self.gains]


def measured(found: HeldOut, gains: tuple[float, float], round: int) -> ErrorRatio | None:
    buffer = RoundBuffer(8)
    buffer.add("old", random_records(ROWS, round=round))
    found.trained_on(buffer)
    records = random_records(ROWS, round=round + 1)
    buffer.add("new", replace(records, seen=np.zeros_like(records.seen)))
    return found.measure(Said(*gains), buffer, 5 * round)  # type: ignore[arg-type]


def test_a_memorised_log_is_said_once() -> None:
    """When a whole window has the Copilot remove less than half as much of new errors as of its own; not for a few percent."""
    cases: dict[tuple[float, float], bool] = {
        (0.05, 0.4): True,
        (0.21, 0.4): False,
        (0.0, 0.09): False,
        (0.3, 0.3): False,
    }
    for gains, memorised in cases.items():
        found = HeldOut(config(), 0)
        ratios = [measured(found, gains, round) for round in range(1, 6)]
        assert [ratio is not None and ratio.memorised for ratio in ratios] == [False, False, memorised, False, False]
        assert ratios[0] is not None and ratios[0].best == pytest.approx(1 - gains[0])
    found = HeldOut(config(), 0)
    at_the_bound = [(0.0, 0.4)] * 4 + [(0.4, 0.4)] * 4 + [(0.0, 0.4)] * 4
    ratios = [measured(found, gains, round) for round, gains in enumerate(at_the_bound, 1)]
    assert sum(ratio is not None and ratio.memorised for ratio in ratios) == 1, "it left the bound and came back"
    text = ErrorRatio(60, 20, 18, {0.0: 1.0, 1.0: 0.95}, 0.6, True).event()
    assert "removes 40%" in text and "of those of new ones 5%" in text


def test_products_that_are_not_finite_are_left_out() -> None:
    found = HeldOut(config(), 0)
    assert measured(found, (float("nan"), 0.1), 1) is None
    ratio = measured(found, (0.2, 0.1), 2)
    assert ratio is not None and ratio.best == pytest.approx(0.8)


def test_the_learner_ends_with_a_pilot_that_ends_early(model_folder: Path, tmp_path: Path) -> None:
    """After the steps of the Pilot's last round, whether it is known before or only after them; with a checkpoint of them."""
    last, rounds = 2 * BURST, make_rounds(model_folder)[: 2 * BURST]

    class Ended(Stored):
        late = polls = 0
        """The step at which the Pilot's end is first known; how often it was asked for since then."""

        def rounds_for(self, step: int) -> int:
            found = super().rounds_for(step)
            self.polls += step == self.late
            if self.polls:
                self.rounds = last
            return found

    for name, late in (("known before", (last - 1) * PER_ROUND), ("known after", last * PER_ROUND)):
        learner, feed = make_learner(model_folder, config()), Ended(rounds)
        feed.late = late
        at = train(learner, feed, config(), tmp_path / name, report=lambda *_: None)
        found = latest(tmp_path / name / "checkpoints")
        assert (at.step, feed.rounds) == (last * PER_ROUND, last) and found is not None and found.step == at.step
        assert (tmp_path / name / "final" / "complete.json").is_file()
