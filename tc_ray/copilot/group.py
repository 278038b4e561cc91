"""The group of Copilot learners: a placement group of actors, watched and restarted as one.

Invariant: the group never touches the Pilot. When a learner dies, all are replaced and go on from the last Copilot
checkpoint; the log keeps what they have not yet read.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.worker import CopilotJob, CopilotWorker
from tc_ray.mistakelog.errors import LeaseLostError

RESERVE_SECONDS = 60


class CopilotError(RuntimeError):
    """The learner group failed more often than `copilot.max_restarts` allows."""


class CopilotGroup:
    """Starts, watches and restarts the learners of one run. `start`, then `wait` (or `stop`)."""

    def __init__(self, job: CopilotJob) -> None:
        self._job = job
        resources = job.config.resources
        self._bundle = {"CPU": resources.copilot_cpus} | ({"GPU": 1.0} if resources.gpus else {})
        self._placement: Any = None
        self._workers: list[Any] = []
        self._thread = threading.Thread(target=self._watch, name="copilot-group", daemon=True)
        self._stopping = threading.Event()
        self._result: Position | None = None
        self._error: BaseException | None = None
        self.restarts = 0

    def start(self) -> None:
        """Reserve the bundles (before the Pilot takes the rest) and start the learners.

        Raises:
            CopilotError: the cluster cannot hold the group.
        """
        count = self._job.config.resources.copilot_workers
        self._placement = placement_group([self._bundle] * count, strategy="PACK")
        if not self._placement.wait(RESERVE_SECONDS):
            remove_placement_group(self._placement)
            raise CopilotError(
                f"no room for {count} Copilot workers of {self._bundle} within {RESERVE_SECONDS} s; "
                f"the cluster has {ray.available_resources()}. Lower resources.copilot_* or add nodes."
            )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> Position | None:
        """The learners' final position; None when `timeout` seconds pass first. Raises what ended them."""
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return self._result

    def stop(self) -> None:
        """End the learners and give their resources back."""
        self._stopping.set()
        self._kill()
        if self._thread.is_alive():
            self._thread.join(10)
        if self._placement is not None:
            remove_placement_group(self._placement)

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self._result = self._attempt()
                return
            except LeaseLostError as error:  # would come again: the log is another's
                self._kill()
                self._error = error
                return
            except Exception as error:  # noqa: BLE001 - whatever ended a learner, the answer is the same: restart or give up
                self._kill()
                if self._stopping.is_set():
                    return
                if self.restarts >= self._job.config.copilot.max_restarts:
                    failure = CopilotError(f"the Copilot failed {self.restarts + 1} times, last with: {error}")
                    failure.__cause__ = error
                    self._error = failure
                    return
                self.restarts += 1
                self._job.tracker.event.remote("restart", f"Copilot learners, after {_last_line(error)}")

    def _attempt(self) -> Position:
        count = self._job.config.resources.copilot_workers
        actor = ray.remote(CopilotWorker)
        self._workers = [
            actor.options(
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
            ).remote(self._job, index, count)
            for index in range(count)
        ]
        address = ray.get(self._workers[0].address.remote())
        ray.get([worker.join.remote(address) for worker in self._workers])
        pending = [worker.run.remote() for worker in self._workers]
        first = pending[0]
        while pending:  # one at a time, so that the first failure is seen at once
            done, pending = ray.wait(pending, num_returns=1)
            ray.get(done)
        return ray.get(first)

    def _kill(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []


def _last_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:300]
