"""The group of Copilot learners: a placement group of actors, watched and restarted as one.

Invariant: the group never touches the Pilot, nor ends it: a group that has failed for good reports an event and raises in
`wait`. When a learner dies, all are replaced and resume from the last Copilot checkpoint; the log keeps what they have not
read yet. An error that would come again (`failures.is_final`) is not retried. Called by `tc_ray.run.job`.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tc_ray.cluster.capacity import SAY_SECONDS, Need, ray_options
from tc_ray.cluster.failures import is_final, short
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.worker import CopilotJob, CopilotWorker
from tc_ray.mistakelog.table.errors import LeaseLostError


class CopilotError(RuntimeError):
    """The learner group failed more often than `copilot.max_restarts` allows, or in a way that a new start would repeat."""


class CopilotGroup:
    """Starts, watches and restarts the learners of one run, on resources `need`. `start`, then `wait` (or `stop`)."""

    def __init__(self, job: CopilotJob, need: Need) -> None:
        self._job, self._need = job, need
        self._placement: Any = None
        self._workers: list[Any] = []
        self._thread = threading.Thread(target=self._watch, name="copilot-group", daemon=True)
        self._stopping = threading.Event()
        self._result: Position | None = None
        self._error: BaseException | None = None
        self.restarts = 0

    def start(self) -> None:
        """Reserve the bundles, before the Pilot takes the rest, and start the learners. Waits, and reports it, for room."""
        strategy = self._job.config.resources.placement.upper()
        self._placement = placement_group([dict(self._need.bundle)] * self._need.count, strategy=strategy)
        pause = 1.0
        while not self._placement.wait(pause):
            self._job.tracker.waiting.remote("copilot", self._need.waiting())
            pause = SAY_SECONDS
        self._job.tracker.waiting.remote("copilot", f"starting {self._need}")
        self._thread.start()

    def release_pilot(self) -> None:
        """End the wait of a Pilot in lockstep for learners that have failed for good. Repeat it: a restarted Ledger forgets it."""
        job = self._job
        if self._error is not None and job.config.copilot.schedule == "lockstep":
            job.ledger.report_copilot.remote(job.rounds, job.total_steps)

    def wait(self, timeout: float | None = None) -> Position | None:
        """The learners' final position; None when `timeout` seconds pass first. Raises what ended them."""
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return self._result

    def stop(self) -> None:
        """End the learners and give their resources back; a second time does nothing."""
        self._stopping.set()
        self._kill()
        if self._thread.is_alive():
            self._thread.join(10)
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self._result = self._attempt()
                return
            except LeaseLostError as error:  # would come again: the log is another's
                self._kill()
                self._error = error
                return
            except Exception as error:  # noqa: BLE001 - whatever ended a learner: restart or give up
                self._kill()
                if self._stopping.is_set():
                    return
                if self.restarts >= self._job.config.copilot.max_restarts or is_final(error):
                    self._give_up(error)
                    return
                self.restarts += 1
                self._job.tracker.event.remote("restart", f"Copilot learners, after {short(error)}")

    def _give_up(self, error: Exception) -> None:
        times = f"{self.restarts + 1} times, last with" if self.restarts else "with"
        failure = CopilotError(f"the Copilot failed {times} {short(error)}")
        failure.__cause__ = error
        self._error = failure
        job = self._job
        job.tracker.waiting.remote("copilot", "")
        job.tracker.event.remote("failed", f"{failure}; the Pilot continues without it")

    def _attempt(self) -> Position:
        count, bundle = self._need.count, self._need.bundle
        actor = ray.remote(CopilotWorker)
        self._workers = [
            actor.options(
                **ray_options(bundle),
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
