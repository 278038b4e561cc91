"""How many workers a start of the Pilot has, where `resources.pilot_min_workers` allows for fewer than `resources.pilot_workers`.

Invariant: a start has as many workers as there is room for when it begins. A Pilot with fewer than asked for is stopped for a larger
start only right after a checkpoint, when there is room. Room is what a placement group gets: it counts what others hold, the
Copilot's learners too, and is demand that an autoscaler sees. Called by `pilot.trainer`.
"""

from __future__ import annotations

import threading
from typing import Any

from tc_ray.cluster.capacity import Need
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


def room_for(job: PilotJob, need: Need) -> int:
    """The number of workers that a start has; blocks while there is no room for the fewest."""
    least = job.config.resources.pilot_min_workers
    if least is None or least == need.count:
        return need.count
    while True:
        for count in range(need.count, least - 1, -1):
            if _has_room(job.config, need, count, ALL_SECONDS if count == need.count else FEWER_SECONDS):
                if count < need.count:
                    job.tracker.event.remote("resize", f"there is room for {count} of {need.count} Pilot workers")
                return count
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
        for count in range(self._need.count, self._count, -1):
            if _has_room(self._job.config, self._need, count - self._count, FEWER_SECONDS):
                return count
        return 0


def _has_room(config: RunConfig, need: Need, count: int, seconds: float) -> bool:
    """Whether the cluster has room for so many bundles within so many seconds. They are given back at once."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(need.bundle)] * count, strategy=config.resources.placement.upper())
    try:
        return bool(group.wait(seconds))
    finally:
        remove_placement_group(group)
