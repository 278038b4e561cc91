"""A Pilot checkpoint: the log first, then the weights, then the marker, and none at all where the log cannot follow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.pilot.loop import PilotJob, Worker

ROUND = 7


class Steps:
    """Stands in for the writer, DeepSpeed, Ledger and Tracker; notes who was called and what was on the disk by then."""

    def __init__(self, checkpoints: Path, log_follows: bool) -> None:
        self.checkpoints, self.log_follows = checkpoints, log_follows
        self.seen: list[tuple[str, bool, bool]] = []
        self.report_checkpoint = SimpleNamespace(remote=lambda number: self._note("ledger"))
        self.module = torch.nn.Linear(1, 1)
        self.event = SimpleNamespace(remote=lambda kind, text: self._note(kind))

    def _note(self, name: str) -> None:
        weights = any(self.checkpoints.glob("round-*/weights"))
        self.seen.append((name, weights, latest_checkpoint(self.checkpoints) is not None))

    def flush(self, number: int) -> bool:
        assert number == ROUND
        self._note("flush")
        return self.log_follows

    def save_checkpoint(self, folder: str, **_: Any) -> None:
        self._note("save")
        Path(folder).mkdir(parents=True)
        (Path(folder) / "weights").write_text("w")


def worker(steps: Steps) -> Worker:
    """A rank by itself, without an engine."""
    made: Any = Worker.__new__(Worker)
    made.rank, made.world_size, made.device, made.postponed = 0, 1, torch.device("cpu"), False
    made.config = RunConfig.model_validate({"run": {"folder": steps.checkpoints.parent}})
    made.checkpoints, made.recorder, made.engine = steps.checkpoints, SimpleNamespace(writer=steps), steps
    made.job = PilotJob(made.config, "", Path(), ROUND, ledger=steps, tracker=steps)
    return made  # type: ignore[no-any-return]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_the_marker_comes_after_the_log_and_the_weights(checkpoints: Path) -> None:
    steps = Steps(checkpoints, log_follows=True)
    assert worker(steps)._checkpoint(ROUND, wait=False)
    assert steps.seen == [("flush", False, False), ("save", False, False), ("ledger", True, True)]
    found = latest_checkpoint(checkpoints)
    assert found is not None and found.round == ROUND


def test_where_the_log_cannot_follow_there_is_no_checkpoint(checkpoints: Path) -> None:
    steps = Steps(checkpoints, log_follows=False)
    assert not worker(steps)._checkpoint(ROUND, wait=False)
    assert [name for name, _, _ in steps.seen] == ["flush", "postponed"]
    assert not checkpoints.exists()
