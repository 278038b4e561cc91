"""Which failures are tried again, and how often, without a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from tc_ray.cluster.failures import first_final, is_final, reason, short
from tc_ray.cluster.session import copilot_need, pilot_need
from tc_ray.config.schema import RunConfig
from tc_ray.copilot import group as copilot_group
from tc_ray.copilot.group import CopilotError, CopilotGroup
from tc_ray.copilot.worker import CopilotJob
from tc_ray.data.source.records import DataError
from tc_ray.mistakelog.table.errors import WriterError
from tc_ray.pilot import trainer
from tc_ray.pilot.loop import PilotJob
from tc_ray.pilot.room import MoreRoomError
from tc_ray.pilot.trainer import PilotError, fit_pilot


def task_error(cause: Exception) -> Exception:
    made: Exception = RayTaskError("run", "Traceback ...", cause).as_instanceof_cause()
    return made


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (IndexError("index out of range in self"), True),
        (ValueError("the checkpoint was made by 2 workers"), True),
        (task_error(KeyError("round")), True),
        (DataError("no rows"), True),
        (RuntimeError("[enforce fail] Connection closed by peer"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RayActorError(), False),
        (OutOfMemoryError("killed"), False),
        (WorkerHealthCheckFailedError("worker died", RayActorError()), False),
        (OSError(5, "Input/output error"), False),
        (WriterError("the log writer failed"), False),
        (task_error(ConnectionError("reset")), False),
    ],
)
def test_what_would_come_again_is_final(error: Exception, final: bool) -> None:
    """Fault 20."""
    assert is_final(error) is final


def test_the_error_that_says_most_is_shown() -> None:
    """The peers of a rank that failed see only a closed connection."""
    errors: dict[int, Exception] = {0: RuntimeError("Connection closed by peer"), 1: IndexError("token 300 of 258")}
    assert first_final(errors)[0] == 1
    assert short(task_error(IndexError("token\n300 of 258"))) == "IndexError: 300 of 258"


def test_why_a_run_failed() -> None:
    """This package's own words as they are; Ray's about memory without the advice that they end with."""
    assert reason(task_error(DataError("train.jsonl, line 3\nis no object"))) == "train.jsonl, line 3\nis no object"
    assert reason(KeyError("round")) == "KeyError: 'round'"
    memory = OutOfMemoryError(
        "Task was killed due to the node running low on memory.\nMemory: 1.0/1.0 GB\nTo disable ..."
    )
    assert short(memory).endswith("running low on memory. Memory: 1.0/1.0 GB")


class Calls:
    """A Tracker or Ledger that remembers."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.made.append((name, *arguments)))

    def events(self, kind: str) -> list[str]:
        return [call[2] for call in self.made if call[:2] == ("event", kind)]


def pilot(monkeypatch: pytest.MonkeyPatch, *outcomes: Exception | None) -> tuple[Calls, int, Exception | None]:
    """fit_pilot over starts that end like this; returns the tracker, the number of starts and the error."""
    tracker, left = Calls(), list(outcomes)

    def fit(*_: Any) -> None:
        outcome = left.pop(0)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(trainer, "_fit", fit)
    monkeypatch.setattr("tc_ray.cluster.capacity.Need.starting", lambda self: "starting")
    config = RunConfig.model_validate({"pilot": {"max_failures": 2}, "log": {"enabled": False}})
    error = None
    try:
        fit_pilot(PilotJob(config, "model", Path("train"), 1, None, tracker), pilot_need(config))
    except PilotError as raised:
        error = raised
    return tracker, len(outcomes) - len(left), error


def failed(**errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", {int(rank[1:]): error for rank, error in errors.items()})


def test_the_pilot_is_not_started_again_for_what_cannot_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: an IndexError of an embedding came three times more, while the status said `restarts: 0`."""
    tracker, starts, error = pilot(monkeypatch, failed(_0=RuntimeError("closed"), _1=IndexError("out of range")), None)
    assert starts == 1 and tracker.events("restart") == []
    assert str(error) == "the Pilot stopped: worker 1: IndexError: out of range"


def test_restarts_of_the_pilot_are_counted_with_the_log_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20; a wait for room is no failure."""
    wait = ControllerError(WorkerGroupStartupTimeoutError(1))
    died = failed(_0=RayActorError())
    tracker, starts, error = pilot(monkeypatch, died, wait, wait, wait, died, None)
    assert (starts, error, len(tracker.events("restart"))) == (6, None, 2)
    tracker, starts, error = pilot(monkeypatch, died, died, died, None)
    assert (starts, len(tracker.events("restart"))) == (3, 2) and error is not None


def test_a_start_has_as_many_workers_as_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that ends for a larger one is no failure."""
    room, starts = [3, 4, 8], []

    def fit(job: PilotJob, need: Any, growth: Any) -> None:
        starts.append((job.config.resources.pilot_workers, need.count, job.config.accumulation_steps))
        if need.count < 8:
            raise MoreRoomError

    def has_room(config: RunConfig, need: Any, count: int, seconds: float) -> bool:
        return count <= room[len(starts)]

    monkeypatch.setattr(trainer, "_fit", fit)
    monkeypatch.setattr("tc_ray.pilot.room._has_room", has_room)
    monkeypatch.setattr("tc_ray.cluster.capacity.Need.starting", lambda self: "starting")
    resources = {"pilot_workers": 8, "pilot_min_workers": 2}
    config = RunConfig.model_validate(
        {"pilot": {"batch_size": 16, "micro_batch_size": 2, "max_failures": 0}, "resources": resources}
    )
    tracker = Calls()
    fit_pilot(PilotJob(config, "model", Path("train"), 1, None, tracker), pilot_need(config))
    assert starts == [(3, 3, 3), (4, 4, 2), (8, 8, 1)], "with as many forward passes as the batch then needs"
    said = [f"there is room for {count} of 8 Pilot workers" for count in (3, 4)]
    assert (tracker.events("resize"), tracker.events("restart")) == (said, [])


def copilot(
    monkeypatch: pytest.MonkeyPatch, error: Exception, schedule: str = "async"
) -> tuple[CopilotGroup, Calls, Calls]:
    """A group whose every attempt ends in `error`, after its end."""
    config = RunConfig.model_validate({"copilot": {"max_restarts": 2, "schedule": schedule}})
    need = copilot_need(config)
    assert need is not None
    tracker, ledger = Calls(), Calls()
    group = CopilotGroup(CopilotJob(config, "pilot", "base", 7, ledger, tracker), need)

    def attempt() -> Any:
        raise error

    monkeypatch.setattr(group, "_attempt", attempt)
    monkeypatch.setattr(copilot_group, "placement_group", lambda *_, **__: SimpleNamespace(wait=lambda _: True))
    group.start()
    with pytest.raises(CopilotError):
        group.wait(10)
    return group, tracker, ledger


def test_a_copilot_that_fails_for_good_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 10."""
    _, tracker, _ = copilot(monkeypatch, task_error(OSError(5, "Input/output error")))
    assert len(tracker.events("restart")) == 2
    (said,) = tracker.events("failed")
    assert said.startswith("the Copilot failed 3 times, last with OSError: ") and said.endswith("continues without it")
    _, tracker, _ = copilot(monkeypatch, task_error(IndexError("out of range")))
    assert tracker.events("restart") == []
    assert tracker.events("failed") == [
        "the Copilot failed with IndexError: out of range; the Pilot continues without it"
    ]


def test_a_pilot_in_lockstep_does_not_wait_for_a_copilot_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 10: it waits for the round of the Copilot, which would never come."""
    group, _, ledger = copilot(monkeypatch, ValueError("no"), "lockstep")
    group.release_pilot()
    assert ("report_copilot", 7, 7 * group._job.config.copilot.steps_per_round) in ledger.made
    group, _, ledger = copilot(monkeypatch, ValueError("no"))
    group.release_pilot()
    assert ledger.made == []
