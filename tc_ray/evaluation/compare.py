"""Results of rows to numbers: a line for each model and set, and paired tests between any two models. Pure.

Right and wrong: Wilson's interval, exact McNemar, Tango's interval of the difference. Other values: the bootstrap over rows,
and chance signs of the paired differences. Holm's correction is over all tests on single sets, and over the pooled ones.
Called by `procedure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from tc_ray.config.section import Metric
from tc_ray.data.prepared.folder import LeftOut
from tc_ray.evaluation.rows import RowResult, RowSet
from tc_ray.evaluation.scores import COUNTED, KNOWS_RIGHT, ranking_measures
from tc_ray.evaluation.statistics import (
    Choice,
    Comparison,
    Interval,
    bootstrap_intervals,
    holm,
    sign_flip_p,
    wilson_interval,
)

POOLED = "all sets"
"""In place of a set's name: the rows of all sets that know right and wrong, together; where none does, of all with the first one's
metric."""


@dataclass(frozen=True)
class Measure:
    """A mean over rows with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One model on one set. value: what the metric calls it. Teacher-forced, None where no row has a gold completion: nll (nats
    per token), error_ratio (to the source's Pilot), token_accuracy. lam, space: 0 for a Pilot."""

    model: str
    set: str
    metric: Metric
    rows: int
    left_out: LeftOut
    value: float
    low: float
    high: float
    nll: float | None
    error_ratio: float | None
    token_accuracy: float | None
    lam: float
    space: str
    measures: dict[str, Measure] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Model b against model a on the same rows. difference: of the values, b - a, with its paired 95% interval; of NLL both in
    nats per token of a, as tokenizers differ. wins: rows that
    only b has right (None where the metric knows no right). better: b's value is the better one. p_holm: corrected."""

    a: str
    b: str
    set: str
    metric: Metric
    rows: int
    wins: int | None
    losses: int | None
    difference: float
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def better(self) -> bool:
        """Whether b is ahead."""
        return self.difference < 0 if self.metric == "nll" else self.difference > 0


def line_of(
    model: str,
    rows: RowSet,
    results: Sequence[RowResult],
    pilot: Sequence[RowResult],
    choice: Choice,
    cutoffs: Sequence[int],
) -> Line:
    """The line of a model. pilot: results of the Pilot of the same source. cutoffs: the K of a ranking."""
    value, forced = _value(rows.metric, results), forced_means(results, pilot)
    return Line(
        model,
        rows.name,
        rows.metric,
        len(results),
        rows.left_out,
        value.value,
        value.low,
        value.high,
        *forced,
        lam=choice[1],
        space=choice[0],
        measures=_measures(rows.metric, results, cutoffs),
    )


def forced_means(
    results: Sequence[RowResult], pilot: Sequence[RowResult]
) -> tuple[float | None, float | None, float | None]:
    """NLL, error ratio and token accuracy over the gold tokens of all rows; None without any."""
    tokens = sum(one.tokens for one in results)
    error, base = (sum(one.squared_error or 0.0 for one in of) for of in (results, pilot))
    if not tokens:
        return None, None, None
    nats = sum((one.nll or 0.0) * one.tokens for one in results)
    return nats / tokens, error / base if base else None, sum(one.first for one in results) / tokens


def _value(metric: Metric, results: Sequence[RowResult]) -> Measure:
    if metric in COUNTED:
        return _share([bool(one.right) for one in results])
    scores = np.array([[one.score] for one in results])
    weights = np.array([float(one.tokens) for one in results]) if metric == "nll" else np.ones(len(results))
    sign = -1.0 if metric == "nll" else 1.0  # a score is better where it is higher
    ((low, high),) = bootstrap_intervals(sign * scores, weights=weights)
    return Measure(float(np.average(sign * scores[:, 0], weights=weights)), low, high)


def _share(right: Sequence[bool]) -> Measure:
    return Measure(sum(right) / len(right), *wilson_interval(sum(right), len(right)))


def _measures(metric: Metric, results: Sequence[RowResult], cutoffs: Sequence[int]) -> dict[str, Measure]:
    if metric == "choice":
        return {name: _share([one.measures[name] > 0 for one in results]) for name in results[0].measures}
    if metric != "ranking":
        return {}
    found = {}
    for name, values in ranking_measures(results, cutoffs).items():
        if name.startswith("Hit"):
            found[name] = _share([value > 0 for value in values])
        else:
            ((low, high),) = bootstrap_intervals(np.array(values)[:, None])
            found[name] = Measure(sum(values) / len(values), low, high)
    return found


Results = Mapping[str, Mapping[str, Sequence[RowResult]]]
"""By model and set."""


def pairs_of(results: Results, sets: Sequence[RowSet]) -> list[Pair]:
    """Any two models on each set, then on several sets together: see POOLED."""
    both = list(combinations(results, 2))
    single = [
        _pair(a, b, rows.name, rows.metric, results[a][rows.name], results[b][rows.name])
        for a, b in both
        for rows in sets
    ]
    known = [rows.name for rows in sets if rows.metric in KNOWS_RIGHT]
    metric: Metric = "exact_match" if known else sets[0].metric
    known = known or [rows.name for rows in sets if rows.metric == metric]
    pooled = []
    for a, b in both if len(known) > 1 else ():
        first, second = ([one for name in known for one in results[model][name]] for model in (a, b))
        pooled.append(_pair(a, b, POOLED, metric, first, second))
    return [*_corrected(single), *_corrected(pooled)]


def _corrected(pairs: list[Pair]) -> list[Pair]:
    corrected = holm([pair.p for pair in pairs])
    return [replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)]


def _pair(a: str, b: str, name: str, metric: Metric, first: Sequence[RowResult], second: Sequence[RowResult]) -> Pair:
    compared = None
    if metric in KNOWS_RIGHT:
        compared = Comparison.of([bool(one.right) for one in first], [bool(one.right) for one in second])
    wins, losses = (None, None) if compared is None else (compared.wins, compared.losses)
    if compared is not None and metric in COUNTED:
        of_values = compared.difference, *compared.interval, compared.p_value
    else:
        of_values = _value_difference(metric, first, second)
    return Pair(a, b, name, metric, len(first), wins, losses, *of_values, p_holm=1.0)


def _value_difference(
    metric: Metric, first: Sequence[RowResult], second: Sequence[RowResult]
) -> tuple[float, float, float, float]:
    weights = np.ones(len(first))
    before, after = (np.array([one.score for one in of]) for of in (first, second))
    if metric == "nll":  # the text is the same, its tokens need not be
        weights, tokens = (np.array([float(one.tokens) for one in of]) for of in (first, second))
        before, after = -before, -after * tokens / weights
    differences = after - before
    interval: Interval = bootstrap_intervals(differences[:, None], weights=weights)[0]
    return float(np.average(differences, weights=weights)), *interval, sign_flip_p(differences * weights)


def averages(lines: Sequence[Line]) -> dict[str, float]:
    """Mean value of each model over its sets whose values are shares of 1; empty where that is one set for each."""
    values: dict[str, list[float]] = {}
    for line in lines:
        if line.metric in KNOWS_RIGHT:
            values.setdefault(line.model, []).append(line.value)
    return {model: sum(found) / len(found) for model, found in values.items() if len(found) > 1}
