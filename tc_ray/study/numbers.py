"""The numbers of a report, from the results of the cells: means over seeds, paired tests over test rows, costs.

Invariant: a test compares two lines on the same rows only, and counts a row once, however many seeds answered it. Cells without
a result are missing in every number and named. Called by `report`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tc_ray.evaluation.statistics import (
    Interval,
    holm,
    mean_interval,
    paired_difference_interval,
    sign_flip_p,
    wilson_interval,
)
from tc_ray.study.cells import Cells, Place
from tc_ray.study.file import Study
from tc_ray.study.results import Answers, Model, Result

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Shown:
    """What stands at a place: the cell's result, and the model and answers that the line shows."""

    result: Result
    model: Model
    answers: Answers


@dataclass(frozen=True)
class Mean:
    """Mean over seeds with its 95% interval: over seeds (Student's t), or over the rows (Wilson) of a single seed."""

    value: float
    interval: Interval
    seeds: int


@dataclass(frozen=True)
class Tested:
    """A line against another one on one task, pooled over seeds. p: corrected within its table by Holm's method.

    difference: mean over seeds. interval: over seeds; of a single seed, over its rows. wins, losses: pairs of answers to a row that differ.
    """

    difference: float
    interval: Interval
    wins: int
    losses: int
    raw_p: float
    p: float


class Numbers:
    """Numbers of one study. results: of its cells, by key."""

    def __init__(self, study: Study, cells: Cells, results: Mapping[str, Result]) -> None:
        self.tasks, self.seeds, self.lines = list(study.file.tasks), study.file.seeds, cells.lines
        self.rows = study.file.rows
        self._overlapping = {name for name, of in study.file.variants.items() if of.get("control") == "ensemble"}
        self.missing = [cell.name for key, cell in cells.by_key.items() if key not in results]
        self._shown = {
            place: Shown(results[cell.key], model, model.sets[self.rows])
            for place, (cell, name) in cells.shown.items()
            if cell.key in results and (model := results[cell.key].models[name])
        }

    def at(self, line: str, task: str) -> dict[int, Shown]:
        """By seed, where there is a result."""
        places = ((seed, Place(line, task, seed)) for seed in self.seeds)
        return {seed: self._shown[place] for seed, place in places if place in self._shown}

    def score(self, line: str, task: str) -> Mean | None:
        """Of what the task's metric counts."""
        found = list(self.at(line, task).values())
        if len(found) == 1 and found[0].answers.score is None:
            answers = found[0].answers
            return Mean(answers.value, wilson_interval(sum(answers.correct), answers.rows), 1)
        return self._over_seeds([shown.answers.value for shown in found], line)

    def average(self, line: str) -> Mean | None:
        """Of the scores over all tasks, seed by seed; None unless every task has every seed."""
        found = [self.at(line, task) for task in self.tasks]
        if any(len(by_seed) < len(self.seeds) for by_seed in found):
            return None
        return self._over_seeds([math.fsum(at[s].answers.value for at in found) / len(found) for s in self.seeds], line)

    def _over_seeds(self, values: Sequence[float], *lines: str) -> Mean | None:
        """Ensembles of neighbouring seeds share a Pilot: they differ less than independent ones, so they have no interval."""
        mean = mean_of(values)
        return replace(mean, interval=(-math.inf, math.inf)) if mean and self._overlapping & set(lines) else mean

    def nll(self, line: str, task: str) -> Mean | None:
        """In nats per gold token."""
        values = [shown.answers.mean_nll for shown in self.at(line, task).values()]
        return mean_of([value for value in values if value is not None])

    def compute(self, line: str, task: str, base: str) -> Mean | None:
        """Training compute of a line as a multiple of that of the Pilot of line `base`."""
        found, of_base = self.at(line, task), self.at(base, task)
        shared = [seed for seed in found if seed in of_base and of_base[seed].result.pilot_seconds]
        alone = {seed: found[seed].model.lam is None for seed in shared}
        return mean_of(
            [
                (found[s].result.pilot_seconds + (0.0 if alone[s] else found[s].result.copilot_seconds))
                / of_base[s].result.pilot_seconds
                for s in shared
            ]
        )

    def tests(self, against: str) -> dict[tuple[str, str], Tested]:
        """Every other line against this one, by line and task; one family for Holm's correction."""
        pairs = {}
        for line in self.lines:
            for task in self.tasks:
                if line != against and (tested := self._test(line, against, [task])) is not None:
                    pairs[line, task] = tested
        return _corrected(pairs)

    def pooled_tests(self, against: str) -> dict[str, Tested]:
        """The same over all tasks together, by line; a family of its own."""
        found = {line: self._test(line, against, self.tasks) for line in self.lines if line != against}
        return _corrected({line: tested for line, tested in found.items() if tested is not None})

    def _test(self, line: str, against: str, tasks: Sequence[str]) -> Tested | None:
        """None where a seed is missing, or the two did not answer the same rows. Tasks weigh alike, as in the difference."""
        found: list[tuple[str, NDArray[np.float64]]] = []  # id of the rows, differences [seeds, rows]
        for task in tasks:
            ours, theirs = self.at(line, task), self.at(against, task)
            if len(ours) < len(self.seeds) or len(theirs) < len(self.seeds):
                return None
            rows_id = ours[self.seeds[0]].answers.rows_id
            if {shown.answers.rows_id for shown in [*ours.values(), *theirs.values()]} != {rows_id}:
                return None
            mine, others = ([at[seed].answers.scores for seed in self.seeds] for at in (ours, theirs))
            found.append((rows_id, np.subtract(mine, others)))
        most = max(one.shape[1] for _, one in found)
        sums: dict[str, NDArray[np.float64]] = {}  # by rows: tasks may share them
        for rows_id, one in found:
            sums[rows_id] = sums.get(rows_id, 0.0) + one.sum(0) * (most / one.shape[1])
        rows = np.concatenate(list(sums.values())).tolist()
        mean = self._over_seeds(np.mean([one.mean(1) for _, one in found], 0).tolist(), line, against)
        assert mean is not None, "a study has seeds"
        wins, losses = (sum(int((sign * one > 0).sum()) for _, one in found) for sign in (1, -1))
        interval, p = mean.interval, sign_flip_p(rows)
        if len(self.seeds) == 1 and all(row in (-1.0, 0.0, 1.0) for row in rows) and len(tasks) == 1:
            interval = paired_difference_interval(wins, losses, len(rows))
        return Tested(mean.value, interval, wins, losses, p, p)


def _corrected(found: Mapping[_Key, Tested]) -> dict[_Key, Tested]:
    corrected = holm([tested.raw_p for tested in found.values()])
    return {key: replace(tested, p=p) for (key, tested), p in zip(found.items(), corrected, strict=True)}


def mean_of(values: Sequence[float]) -> Mean | None:
    """Mean over seeds; None of no values."""
    return Mean(math.fsum(values) / len(values), mean_interval(values), len(values)) if values else None
