"""The learning rate that a round logs is the one it was trained with, after a restart too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.data.prepared.folder import SCHEMA
from tc_ray.models.schedule import rate_factor
from tc_ray.pilot.loop import PilotJob, Worker
from tests.support.tiny_model import make_tokenizer
from tests.support.tiny_run import tiny_config

ROUNDS = 6

pytestmark = pytest.mark.usefixtures("group")


class Killed(Exception):
    pass


def train_file(folder: Path) -> Path:
    rows = []
    for number in range(24):
        prompt, completion = make_tokenizer()([f"{number}+1=", f"{number + 1}"])["input_ids"]
        rows.append(
            {
                "sample_id": number,
                "input_ids": [*prompt, *completion, 1],
                "target_start": len(prompt),
                "prompt": "",
                "completion": "",
                "answer": None,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "train.parquet")
    return folder / "train.parquet"


class Points:
    """Stands for the Tracker's actor; `die_at`: the round whose report kills the worker."""

    def __init__(self, die_at: int | None) -> None:
        self.rates: dict[int, float] = {}
        self._die_at = die_at
        self.pilot = SimpleNamespace(remote=self._pilot)
        quiet = SimpleNamespace(remote=lambda *_: None)
        self.process = self.event = self.waiting = self.spent = self.memory = quiet

    def _pilot(self, number: int, metrics: dict[str, Any]) -> None:
        if number == self._die_at:
            raise Killed
        self.rates[number] = metrics["learning_rate"]


def test_each_round_logs_its_own_learning_rate(tmp_path: Path) -> None:
    """Fault 21: the rate was read after the step, when it is that of the next round (the last round logged 0)."""
    config = tiny_config(
        tmp_path,
        log__enabled=False,
        pilot__warmup_ratio=0.4,
        pilot__checkpoint_every_rounds=3,
        pilot__batch_size=4,
        pilot__micro_batch_size=2,
    )
    rates: dict[int, float] = {}
    for die_at in (5, None):
        points = Points(die_at)
        job = PilotJob(config, config.model.pilot, train_file(tmp_path), ROUNDS, None, points)
        try:
            Worker(job, 0, 1).run()
        except Killed:
            assert die_at is not None
        rates |= points.rates
        expected = set(range(1, 5)) if die_at else set(range(4, ROUNDS + 1))
        assert points.rates.keys() == expected, "rounds 4 to 6 are those of the restarted worker"
    base = config.pilot.learning_rate
    for number in range(1, ROUNDS + 1):
        scheduled = base * rate_factor(number - 1, steps=ROUNDS, warmup_ratio=0.4, schedule="cosine")
        assert rates[number] == pytest.approx(scheduled), f"round {number}"
