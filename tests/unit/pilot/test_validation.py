"""Validation NLL in training: right, without effect on training, the early end, and the weights of the best round.

Real engines of one worker, without Ray.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tc_ray.data.prepared.batches import TrainTable
from tc_ray.data.prepared.folder import SCHEMA
from tc_ray.models.pilot.load import load_pilot
from tc_ray.pilot.checkpoint import find_checkpoints
from tc_ray.pilot.loop import PilotJob, Worker
from tc_ray.pilot.validated import Validated
from tc_ray.pilot.validation import ValidationRows
from tests.support.tiny_model import make_tokenizer
from tests.support.tiny_run import tiny_config

ROUNDS = 6

pytestmark = pytest.mark.usefixtures("group")


class Killed(Exception):
    pass


def write_rows(file: Path, texts: list[tuple[str, str]], end: tuple[int, ...] = (1,)) -> Path:
    """Rows of (prompt, completion), with end token; an empty completion: none, as of held-out rows with an answer only."""
    rows = []
    for number, (prompt, completion) in enumerate(texts):
        ids = make_tokenizer()([prompt, completion])["input_ids"]
        rows.append(
            {
                "sample_id": number,
                "input_ids": [*ids[0], *ids[1], *end] if completion else ids[0],
                "target_start": len(ids[0]),
                "prompt": prompt,
                "completion": completion or None,
                "answer": completion or "3",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    return file


class Points:
    """Stands for the Tracker's actor. die_at: the validation whose report kills the worker."""

    def __init__(self, die_at: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.found: dict[int, dict[str, Any]] = {}
        self.events: list[tuple[str, str]] = []
        self._die_at = die_at
        self.pilot = SimpleNamespace(remote=lambda number, metrics: self.losses.update({number: metrics["loss"]}))
        self.validation = SimpleNamespace(remote=self._validation)
        self.event = SimpleNamespace(remote=lambda *event: self.events.append(event))
        self.process = self.waiting = self.spent = self.memory = SimpleNamespace(remote=lambda *_: None)

    def _validation(self, number: int, metrics: dict[str, Any]) -> None:
        if number == self._die_at:
            raise Killed
        self.found[number] = metrics


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sums to train on; validation rows that are wrong, so that their NLL rises as the sums are learned."""
    write_rows(tmp_path / "validation.parquet", [(f"{n}+1=", "zq" * (n % 3)) for n in range(9)], end=())
    return write_rows(tmp_path / "train.parquet", [(f"{n}+1=", f"{n + 1}") for n in range(24)])


def train(tmp_path: Path, data: Path, points: Points, **settings: Any) -> Any:
    """The run's config, after its training by one worker."""
    given = {
        "log__enabled": False,
        "pilot__checkpoint_every_rounds": 2,
        "pilot__keep_checkpoints": 1,
        "pilot__batch_size": 4,
        "pilot__micro_batch_size": 2,
        "pilot__learning_rate": 3e-2,
        "pilot__lr_schedule": "constant",
    }
    config = tiny_config(tmp_path, **(given | settings))
    Worker(PilotJob(config, config.model.pilot, data, ROUNDS, None, points), 0, 1).run()
    return config


def nll_of(folder: Path, data: Path) -> float:
    """Of all validation rows with a completion, by the exported model, one row at a time."""
    model, table = (
        load_pilot(folder, dtype=torch.float32).eval(),
        TrainTable(data.with_name("validation.parquet"), held_out=True),
    )
    total, tokens = 0.0, 0
    for row in table.with_target():
        batch = table.batch(np.array([row]))
        ids, start = torch.from_numpy(batch["input_ids"]), int(batch["target_start"][0])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        total -= float(log_probs.gather(1, ids[0, start:, None]).sum())
        tokens += ids.shape[1] - start
    return total / tokens


def test_it_is_measured_and_changes_nothing(tmp_path: Path, data: Path) -> None:
    plain, watched = Points(), Points()
    train(tmp_path, data, plain, run__folder=tmp_path / "plain")
    config = train(tmp_path, data, watched, pilot__validate_every=4)
    assert watched.losses == plain.losses and plain.found == {}
    assert list(watched.found) == [4, ROUNDS], "every four rounds, and after the last one"
    assert watched.found[ROUNDS]["nll"] == pytest.approx(nll_of(config.run.path / "pilot" / "final", data), rel=1e-4)


def test_the_early_end_and_the_best_weights(tmp_path: Path, data: Path) -> None:
    """The NLL is lowest first; killed in the validation that ends the run, it ends in the same round when it is resumed."""
    settings = {"pilot__validate_every": 1, "pilot__patience": 2, "pilot__final": "best"}
    first = Points(die_at=3)
    with pytest.raises(Killed):
        train(tmp_path, data, first, **settings)
    points = Points()
    config = train(tmp_path, data, points, **settings)
    assert first.found[1]["nll"] == first.found[2]["lowest"] < first.found[2]["nll"]
    assert (max(points.losses), points.found[3]["best_round"], points.found[3]["ended"]) == (3, 1, 1)
    assert [kind for kind, _ in points.events] == ["early end"]
    assert points.events[0][1].startswith("round 3 is the Pilot's last: 2 validations in a row found no lower NLL (the")
    final = config.run.path / "pilot" / "final"
    assert nll_of(final, data) == pytest.approx(points.found[3]["lowest"], rel=1e-4)
    assert json.loads((final / "complete.json").read_text())["round"] == 1
    # of the newest one and of the best round
    assert [one.round for one in find_checkpoints(config.run.path / "pilot" / "checkpoints")[0]] == [1, 3]

    again = Points()
    train(tmp_path, data, again, **settings)
    assert again.losses == {} and nll_of(final, data) == pytest.approx(points.found[3]["lowest"], rel=1e-4)


def test_without_its_checkpoint_the_best_round_is_not_replaced_by_another(tmp_path: Path, data: Path) -> None:
    settings = {"pilot__validate_every": 1, "pilot__patience": 2, "pilot__final": "best"}
    config = train(tmp_path, data, Points(), **settings)
    (config.run.path / "pilot" / "checkpoints" / "round-000001" / "complete.json").unlink()
    with pytest.raises(ValueError, match="round-000001: the checkpoint of the round with the lowest NLL is absent"):
        train(tmp_path, data, Points(), **settings)


def test_rows_are_spread_and_every_rank_has_as_many_turns(tmp_path: Path) -> None:
    """Two ranks, three batches: the second rank repeats one for the forward pass, and counts it once."""
    write_rows(tmp_path / "v.parquet", [("1=", "" if n == 4 else "x" * (1 + n % 3)) for n in range(40)])
    calls: list[int] = []

    class Engine:
        device = torch.device("cpu")
        eval = train = staticmethod(lambda: None)

        def __call__(self, input_ids: Any, lengths: Any, target_start: Any, loss_scale: float) -> Any:
            calls.append(len(input_ids))
            return (lengths - target_start).sum() * 2.0, None

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda total: found.append(float(total)))
        for rank in range(2):
            rows = ValidationRows(tmp_path / "v.parquet", most=6, batch_size=2, rank=rank, world_size=2)
            rows.nll(Engine())
    assert len(calls) == 4
    assert sum(found) == 2.0 * rows._tokens
    every = ValidationRows(tmp_path / "v.parquet", most=100, batch_size=64, rank=0, world_size=1)
    assert len(every._batches[0]) == 39 and every.nll(Engine()) == 2.0


def test_an_nll_that_is_not_finite_is_no_lower_one() -> None:
    found = Validated().then(1, float("nan")).then(2, 3.0).then(3, float("inf"))
    assert (found.nll, found.lowest, found.best, found.waited) == (None, 3.0, 2, 1)
