"""Whatever takes a worker away, its batch goes to another one. Without a cluster: workers answer in this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from rich.console import Console

from tc_ray.evaluation.passes import Pass
from tc_ray.evaluation.pool import DEATHS, EvaluationError, Pool
from tc_ray.evaluation.progress import Progress
from tests.support.evaluation_samples import held_out, row_set, source

LOST = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."),
    ray.exceptions.ObjectLostError("00", None, ""),
]


class Answer(NamedTuple):
    """What `ray.get` gives, or raises."""

    number: int
    value: Any

    def __hash__(self) -> int:
        return self.number


class Worker:
    """An actor's handle; calls go to `remote`."""

    def __init__(self, remote: Any) -> None:
        self.compute, self.remote = self, remote


class Here(Pool):
    """Its workers raise what `errors` holds, then answer."""

    def __init__(self, folder: Path, errors: list[Exception]) -> None:
        super().__init__(folder, Progress(Console(file=io.StringIO())), bundle={"CPU": 1.0})
        self.errors = errors

    def _start(self, useful: int) -> None:
        self._add()

    def _add(self) -> None:
        self._idle.append(Worker(self._answer))

    def _answer(self, job: Pass, batch: list[Any], folder: Path) -> Any:
        found = {number: "found" for number, _ in batch}
        return Answer(batch[0][0], self.errors.pop() if self.errors else found)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any) -> Any:
        if isinstance(answer.value, Exception):
            raise answer.value
        return answer.value

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda answers, **_: (answers[:1], answers[1:]))
    monkeypatch.setattr(ray, "kill", lambda worker: None)


def job() -> Pass:
    return Pass("said", source(), row_set(held_out()), (("logits", 0.0),), "own", 2, 16)


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_lost_worker_costs_its_batch_only(tmp_path: Path, error: Exception) -> None:
    assert Here(tmp_path, [error] * DEATHS).run(job()) == ["found"] * len(held_out())
    with pytest.raises(EvaluationError, match=r"4 workers died over m on test, lambda 0 \(decoded\) at rows .*memory"):
        Here(tmp_path, [error] * (DEATHS + 1)).run(job())


def test_an_error_of_the_work_itself_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not this"):
        Here(tmp_path, [ValueError("not this")]).run(job())
