"""Test, then train: the Copilot is measured on new records of the log before a batch is drawn from them (theorem 4.1, live).

The error ratio E||l - lam f||^2 / E||l||^2 is below 1 for some lambda exactly where the correction helps. Records of samples that the
Pilot had not seen (`seen` 0), of rounds that no batch came from, are held-out data for both models.
Invariants: measuring changes nothing of the training. The draw follows from the seed, the step's number and the rows held, and sums
are added over ranks, so all ranks agree. It goes on from a checkpoint as if never stopped. Called by `training.train`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.batch import batch_from_records
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.copilot.learner import Learner
from tc_ray.mistakelog.rows.records import Records
from tc_ray.models.copilot import CopilotBatch

EVERY_STEPS = 20
"""A measurement is two forward passes, at most one in so many steps: 2 to 3% of the steps' time."""
MOST_RECORDS = 64
WINDOW = 8
"""Measurements that make a ratio: one alone has as few records as a batch."""
MEMORISED_GAIN, MEMORISED_SHARE = 0.1, 0.5
"""The log counts as memorised where a whole window has the Copilot remove at least MEMORISED_GAIN of the squared errors of its own
records (less may be chance), and less than MEMORISED_SHARE of that on new ones: most of what it knows is then those records."""
_DRAW = 0x7E57  # keeps the draws' seeds apart from those of the batches


@dataclass(frozen=True)
class ErrorRatio:
    """E||l - lam f||^2 / E||l||^2 over the newest WINDOW measurements.

    step: steps taken before. round: newest of the log by then. records: held-out ones measured. by_lam: on them, for each lambda
    of the grid. in_sample: least over the grid, on records that batches are drawn from. memorised: this is the first window that shows it.
    """

    step: int
    round: int
    records: int
    by_lam: dict[float, float]
    in_sample: float
    memorised: bool

    @property
    def lam(self) -> float:
        """The best lambda of the grid; 0 where no other is below 1."""
        return min(self.by_lam, key=lambda lam: (self.by_lam[lam], lam))

    @property
    def best(self) -> float:
        """The ratio at the best lambda."""
        return self.by_lam[self.lam]

    def metrics(self) -> dict[str, float]:
        """For the Tracker."""
        found = {"held_out": self.best, "in_sample": self.in_sample, "lam": self.lam, "records": float(self.records)}
        return found | {f"lam_{lam:g}": ratio for lam, ratio in self.by_lam.items()}

    @classmethod
    def read(cls, fields: dict[str, Any]) -> ErrorRatio:
        """From its fields as JSON has them."""
        return cls(**fields | {"by_lam": {float(lam): ratio for lam, ratio in fields["by_lam"].items()}})

    def text(self) -> str:
        """In one line."""
        return f"{self.best:.3f} at lambda {self.lam:g}, in-sample {self.in_sample:.3f} (round {self.round})"

    def event(self) -> str:
        """What is said of a memorised log."""
        return (
            f"round {self.round}: the log has become memorised: of the squared errors of its own records the Copilot removes "
            f"{1 - self.in_sample:.0%}, of those of new ones {1 - self.best:.0%}. More steps on this log will hardly help on new text"
        )


class HeldOut:
    """The measurements of one training. rank: of this learner."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self._seed, self._grid, self._rank = config.run.seed, sorted(set(config.fusion.lam_grid)), rank
        self._count = min(config.copilot.batch_size, MOST_RECORDS)
        self._trained_to = 0
        """Newest round that a batch could have come from."""
        self._due = EVERY_STEPS
        """First step before which the next measurement may be."""
        self._window: deque[list[float]] = deque(maxlen=WINDOW)
        """Of each measurement: l.l, l.f, f.f of the held-out records, the same of the others, number of held-out records."""
        self._memorised = False

    def measure(self, learner: Learner, buffer: RoundBuffer, step: int) -> ErrorRatio | None:
        """Before step `step` + 1: the ratio, if one is due and there are new records for it (collective)."""
        if step < self._due:
            return None
        seed = (self._seed, _DRAW, step)
        new = buffer.sample(self._count, seed, after=self._trained_to, unseen=True)
        old = buffer.sample(self._count, seed, up_to=self._trained_to)
        if new is None or old is None:
            return None
        self._due = step + EVERY_STEPS
        sums = learner.inner_products([self._own_part(records, learner.world_size) for records in (new, old)])
        found = [*sums[0], *sums[1], float(len(new))]
        if not np.isfinite(found).all() or not sums[0][0] or not sums[1][0]:
            return None  # a step on such records is left out and counted
        self._window.append(found)
        return self._ratio(step, buffer.newest)

    def trained_on(self, buffer: RoundBuffer) -> None:
        """A batch was drawn from the buffer as it is."""
        self._trained_to = max(self._trained_to, buffer.newest)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "trained_to": self._trained_to,
            "due": self._due,
            "window": list(self._window),
            "memorised": self._memorised,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state` of a checkpoint."""
        self._trained_to, self._due, self._memorised = state["trained_to"], state["due"], state["memorised"]
        self._window.extend(state["window"])

    def _own_part(self, records: Records, world_size: int) -> CopilotBatch | None:
        own = range(self._rank, len(records), world_size)
        return batch_from_records(records, own) if own else None

    def _ratio(self, step: int, newest: int) -> ErrorRatio:
        total = np.sum(list(self._window), axis=0)
        by_lam = _ratios(total[:3], self._grid)
        held_out, in_sample = min(by_lam.values()), min(_ratios(total[3:6], self._grid).values())
        gain = 1 - in_sample
        memorised = len(self._window) == WINDOW and gain >= MEMORISED_GAIN and 1 - held_out < MEMORISED_SHARE * gain
        first, self._memorised = memorised and not self._memorised, memorised or self._memorised
        return ErrorRatio(step, newest, int(total[6]), by_lam, in_sample, first)


def _ratios(products: Sequence[float], grid: Sequence[float]) -> dict[float, float]:
    """|l - lam f|^2 / |l|^2 for each lambda, from l.l, l.f and f.f."""
    errors, across, squares = products
    return {lam: max(0.0, float(1 + lam * (lam * squares - 2 * across) / errors)) for lam in grid}
