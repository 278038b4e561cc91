"""Workers of an evaluation, spread over the Ray cluster, and the rows of a pass handed out to them batch by batch.

Invariant: every row of a pass is computed once and found in a part, whatever worker dies: its batch goes to another one. Rows
of earlier parts are not computed again. Plain actors, not Ray Data: docs/decisions.md says why. Called by `procedure`.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tc_ray.cluster.capacity import Bundle, ray_options
from tc_ray.evaluation.passes import Numbered, Pass, read_parts
from tc_ray.evaluation.progress import Progress

TICK_SECONDS = 1.0
SMALL_BATCH = 8
"""Rows that are worth a worker of their own."""
DEATHS = 3
"""Workers that may die over one batch: a fourth one would die too."""


class EvaluationError(RuntimeError):
    """Workers died over and over; the message says at what."""


class Pool:
    """As many workers as the cluster has room for; a context manager.

    folder: where the parts of all passes are kept. bundle: Ray resources of each worker, which has one torch thread per CPU.
    memory_bytes: what one needs; without GPUs there are no more than the memory holds.
    """

    def __init__(self, folder: Path, progress: Progress, *, bundle: Bundle, memory_bytes: int = 0) -> None:
        self._folder, self._progress = folder, progress
        self._bundle, self._memory_bytes = bundle, memory_bytes
        self._starting: dict[Any, Any] = {}
        """Workers by the answer that says that they run: of more than fit, some never do."""
        self._idle: list[Any] = []
        self.keys: set[str] = set()
        """Of all passes so far."""

    def __enter__(self) -> Pool:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        peaks = [worker.peak_memory.remote(f"evaluation-{number}") for number, worker in enumerate(self._idle)]
        for peak in ray.wait(peaks, num_returns=len(peaks), timeout=TICK_SECONDS)[0] if peaks else ():
            with suppress(ray.exceptions.RayError):  # it has died meanwhile
                self._progress.memory(ray.get(peak))
        for worker in (*self._starting.values(), *self._idle):
            ray.kill(worker)
        self._starting, self._idle = {}, []

    def run(self, job: Pass) -> list[Any]:
        """What the pass finds for each row, in order. Raises EvaluationError, and the error of a worker as it is."""
        folder = self._folder / job.key
        self.keys.add(job.key)
        rows = job.rows.rows
        found = read_parts(folder)
        missing: list[Numbered] = [(number, row) for number, row in enumerate(rows) if number not in found]
        if missing:
            # rows of similar length share a batch; the longest first, so that no worker is left with them at the end
            missing.sort(key=lambda pair: -len(pair[1].input_ids))
            self._start(math.ceil(len(missing) / min(SMALL_BATCH, job.batch_size)))
            share = math.ceil(len(missing) / (len(self._starting) + len(self._idle)))
            size = min(job.batch_size, share)
            batches = deque(missing[at : at + size] for at in range(0, len(missing), size))
            self._work(job, folder, batches, found)
        self._progress.show(job.shown, len(rows), len(rows))
        return [found[number] for number in range(len(rows))]

    def _work(self, job: Pass, folder: Path, batches: deque[list[Numbered]], found: dict[int, Any]) -> None:
        import ray

        # Ray's memory monitor, and a node that dies with an answer, have errors of their own
        lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError)
        busy: dict[Any, tuple[Any, list[Numbered]]] = {}
        deaths: dict[int, int] = {}
        total = len(job.rows.rows)
        light = replace(job, rows=replace(job.rows, rows=()))  # each call carries the rows of its batch
        try:
            while batches or busy:
                while batches and self._idle:
                    worker, batch = self._idle.pop(), batches.popleft()
                    busy[worker.compute.remote(light, batch, folder)] = worker, batch
                waiting = "" if busy else "waiting for workers: "
                self._progress.show(waiting + job.shown, len(found), total)
                done, _ = ray.wait([*busy, *self._starting], num_returns=1, timeout=TICK_SECONDS)
                for answer in done:
                    worker, batch = busy.pop(answer, (self._starting.pop(answer, None), []))
                    try:
                        result = ray.get(answer)
                    except lost as error:
                        first = batch[0][0] if batch else -1
                        deaths[first] = deaths.get(first, 0) + 1
                        if deaths[first] > DEATHS:
                            raise EvaluationError(_died(job, batch, error)) from None
                        self._progress.note(f"a worker died at {job.shown}; its batch goes to another one")
                        if batch:
                            batches.appendleft(batch)
                        self._add()
                        continue
                    self._idle.append(worker)
                    if batch:
                        found |= result
        finally:
            for worker, _ in busy.values():  # after an error; they are at work on what nobody wants
                ray.kill(worker)

    def _start(self, useful: int) -> None:
        """Workers for so many batches, no more than the cluster has resources for; those that run are kept."""
        import ray

        resources = ray.cluster_resources()
        room = min(int(resources.get(name, 0.0) / amount) for name, amount in self._bundle.items())
        if self._memory_bytes and not self._bundle.get("GPU"):
            room = min(room, int(resources.get("memory", 0) / self._memory_bytes))
        for _ in range(min(useful, max(1, room)) - len(self._starting) - len(self._idle)):
            self._add()

    def _add(self) -> None:
        import ray

        from tc_ray.evaluation.worker import EvaluationWorker

        options = ray_options(self._bundle)
        threads, device = max(1, int(self._bundle["CPU"])), "cuda" if self._bundle.get("GPU") else "cpu"
        worker = ray.remote(EvaluationWorker).options(**options, scheduling_strategy="SPREAD").remote(threads, device)
        self._starting[worker.ready.remote()] = worker


def _died(job: Pass, batch: list[Numbered], error: Exception) -> str:
    at = f"rows {', '.join(str(number) for number, _ in batch[:5])}, ..." if batch else "its start"
    reason = next(iter(str(error).strip().splitlines()), "")
    return (
        f"evaluation: {DEATHS + 1} workers died over {job.shown} at {at} ({reason}). Is the memory enough? "
        "fusion.eval_batch_size lowers the need; what is done is kept, and the same command goes on from there"
    )
