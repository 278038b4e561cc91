"""How many workers a start of the Pilot has, where `resources.pilot_min_workers` allows for fewer than `resources.pilot_workers`.

Invariant: a start has as many workers as there is room for when it begins. A Pilot with fewer than asked for is stopped for a larger
start only right after a checkpoint, when there is room. Room is what a placement group gets: it counts what others hold, the
Copilot's learners too, and is demand that an autoscaler sees. Called by `pilot.trainer`.
"""

from __future__ import annotations

import threading
from typing import Any

from pydantic import ValidationError

from tc_ray.cluster.capacity import Bundle, Need
from tc_ray.config.schema import RunConfig
from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.pilot.loop import PilotJob

ALL_SECONDS = 20.0
"""How long a start waits for room for all workers before it takes fewer."""
FEWER_SECONDS = 2.0
LOOK_SECONDS = 10.0
"""How often a Pilot with fewer workers looks for room."""


class MoreRoomError(Exception):
    """A start was ended because a larger one has room."""


def room_for(job: PilotJob, need: Need) -> RunConfig:
    """The run's config with the number of workers that a start has; blocks while there is no room for the fewest."""
    least = job.config.resources.pilot_min_workers
    if least is None or least == need.count:
        return job.config
    choices = _choices(job.config, least, need.count)
    while True:
        for config in choices:
            count = config.resources.pilot_workers
            if _has_room(need.bundle, count, ALL_SECONDS if config is choices[0] else FEWER_SECONDS):
                if config is not choices[0]:
                    job.tracker.event.remote("resize", f"there is room for {count} of {need.count} Pilot workers")
                return config
        job.tracker.waiting.remote("pilot", need.waiting())


class Growth:
    """In its context: looks for room for more than the `count` workers of a start, and ends that start when there is."""

    def __init__(self, job: PilotJob, need: Need, count: int) -> None:
        self._job, self._need, self._count = job, need, count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pilot-growth", daemon=True)
        self.controller: Any = None
        """Ray Train's actor, which ends the start by its own end."""
        self.ended = False

    def __enter__(self) -> Growth:  # noqa: PYI034 - Self needs Python 3.11
        if self._count < self._need.count:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        import ray

        root = self._job.config.run.path / "pilot" / "checkpoints"
        while not self._stop.wait(LOOK_SECONDS):
            if not self._more():
                continue
            before = latest_checkpoint(root)
            while latest_checkpoint(root) == before:
                if self._stop.wait(1.0):
                    return
            more = self._more()  # others may have taken it meanwhile
            if more and self.controller is not None and not self._stop.is_set():
                self._job.tracker.event.remote(
                    "resize", f"there is room for {more} of {self._need.count} Pilot workers"
                )
                self.ended = True
                ray.kill(self.controller)
                return

    def _more(self) -> int:
        """The most workers that there is room for; 0: for no more than there are."""
        configs = _choices(self._job.config, self._count + 1, self._need.count)
        counts = (config.resources.pilot_workers for config in configs)
        return next((n for n in counts if _has_room(self._need.bundle, n - self._count, FEWER_SECONDS)), 0)


def _choices(config: RunConfig, least: int, most: int) -> list[RunConfig]:
    """The config for each number of workers that divides its batch, the largest first."""
    found = []
    for count in range(most, least - 1, -1):
        try:
            found.append(config.with_pilot_workers(count))
        except ValidationError:
            continue
    return found


def _has_room(bundle: Bundle, count: int, seconds: float) -> bool:
    """Whether the cluster has room for so many bundles within so many seconds. They are given back at once."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(bundle)] * count, strategy="PACK")
    try:
        return bool(group.wait(seconds))
    finally:
        remove_placement_group(group)
