"""Uncertainty of accuracies and other means, and of the difference between two models on the same rows; choosing lambda.

Counts: exact or score methods, which also hold for small counts. Other measures: the bootstrap over rows. Called by metrics
and report. `wins` are rows that only the second model has right, `losses` rows that only the first has right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
"""95% interval (low, high)."""

Z_95 = 1.959963984540054
"""Two-sided 95% point of the normal distribution."""


def wilson_interval(successes: int, rows: int) -> Interval:
    """Wilson score interval (low, high) of a proportion, as fractions; (0, 1) for no rows."""
    if rows == 0:
        return 0.0, 1.0
    share, z = successes / rows, Z_95
    middle = share + z * z / (2 * rows)
    reach = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    # at the ends the formula gives 0 and 1 only up to rounding
    low = 0.0 if successes == 0 else (middle - reach) / scale
    high = 1.0 if successes == rows else (middle + reach) / scale
    return low, high


def mcnemar_p(wins: int, losses: int) -> float:
    """Exact two-sided McNemar p value: chance of so uneven a split if wins and losses were equally likely."""
    changed = wins + losses
    ways = tail = 1
    for k in range(min(wins, losses)):  # `math.comb` for each takes seconds of ten thousand rows
        ways = ways * (changed - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def paired_difference_interval(wins: int, losses: int, rows: int) -> Interval:
    """Tango's score interval (low, high) of the accuracy difference (wins - losses) / rows of paired answers.

    Tango 1998, Statistics in Medicine 17: the differences that a score test would not reject. At difference 0 it agrees with
    McNemar's test without continuity correction, and it holds for small wins + losses.
    """
    estimate = (wins - losses) / rows

    def statistic(difference: float) -> float:
        a = 2 * rows
        b = (2 * rows - wins + losses) * difference - wins - losses
        c = -losses * difference * (1 - difference)
        losing = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = rows * (2 * losing + difference * (1 - difference))
        return (wins - losses - rows * difference) / math.sqrt(variance) if variance > 0 else 0.0

    low = _root(lambda d: statistic(d) - Z_95, -1.0, estimate)
    high = _root(lambda d: statistic(d) + Z_95, estimate, 1.0)
    return low, high


def bootstrap_intervals(
    values: NDArray[np.float64], *, weights: NDArray[np.float64] | None = None, resamples: int = 2000, seed: int = 0
) -> list[Interval]:
    """95% percentile intervals of the column means of `values` [rows, columns], by resampling rows.

    All columns use the same resamples, so a column of differences gets its paired interval. No rows: (nan, nan).
    weights: of rows in the mean; None: all alike.
    """
    rows = len(values)
    if not rows:
        return [(math.nan, math.nan)] * values.shape[1]
    draw, of_row = np.random.default_rng(seed), np.ones(rows) if weights is None else weights
    drawn = (draw.integers(rows, size=rows) for _ in range(resamples))
    means = np.stack([(values[at] * of_row[at, None]).sum(0) / of_row[at].sum() for at in drawn])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95% points of Student's t for 1, 2, ... degrees of freedom."""


def mean_interval(values: Sequence[float]) -> Interval:
    """95% interval of the mean of repetitions, such as seeds, by Student's t; (-inf, inf) for a single one."""
    count = len(values)
    if count < 2:
        return -math.inf, math.inf
    mean, free = math.fsum(values) / count, count - 1
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / free / count)
    # beyond the table the expansion of t around the normal point is right to three digits
    point = T_95[free - 1] if free <= len(T_95) else Z_95 + (Z_95**3 + Z_95) / (4 * free)
    return mean - point * spread, mean + point * spread


def sign_flip_p(differences: Iterable[float], *, flips: int = 9999, seed: int = 0) -> float:
    """Two-sided p of the hypothesis that each difference is as likely with the other sign: one difference a test row.

    Whole numbers: exact, and of answers right and wrong McNemar's test. Others: by chance signs, at least 1e-4.
    """
    moved = np.array([difference for difference in differences if difference])
    if not len(moved):
        return 1.0
    observed = abs(math.fsum(moved))
    if (moved == moved.round()).all():
        return _exact_flip_p(np.abs(moved).astype(int), observed)
    draw = np.random.default_rng(seed)
    sums = [abs(float((moved * draw.choice((-1.0, 1.0), len(moved))).sum())) for _ in range(flips)]
    # rounding must not make a sum of the same terms smaller than the observed one
    return (1 + sum(total >= observed * (1 - 1e-12) for total in sums)) / (1 + flips)


def _exact_flip_p(sizes: NDArray[np.int_], observed: float) -> float:
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0  # of each sum from -reach to reach
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # sums beyond `reach` have no chance yet
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, chances[sums >= observed - 0.5].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): with these below 5%, one false finding in 20 such families."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = largest
    return corrected


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """The root of a falling function between `low` and `high`, by bisection."""
    for _ in range(80):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


Choice = tuple[str, float]
"""(fusion space, lam). lam 0 is the Pilot itself, whatever the space."""


@dataclass(frozen=True)
class Comparison:
    """A second model against a first on the same rows. wins: only the second is right; losses: only the first is."""

    rows: int
    wins: int
    losses: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Comparison:
        """From correctness, row by row."""
        pairs = list(zip(first, second, strict=True))
        return cls(len(pairs), sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs))

    @property
    def difference(self) -> float:
        """Of the accuracies."""
        return (self.wins - self.losses) / self.rows

    @property
    def p_value(self) -> float:
        """Exact McNemar."""
        return mcnemar_p(self.wins, self.losses)

    @property
    def interval(self) -> Interval:
        """95% interval of the accuracy difference, paired."""
        return paired_difference_interval(self.wins, self.losses, self.rows)


def choose(scores: Mapping[Choice, Sequence[float]], nll: Mapping[Choice, float]) -> Choice:
    """The choice for validation rows: of those with a higher mean score than the Pilot, the first of `preferred`.

    lam 0 is among the choices and wins every tie, because a correction must prove itself.
    """
    pilot = next(choice for choice in scores if choice[1] == 0)
    total = math.fsum(scores[pilot])
    ahead = {choice: of_rows for choice, of_rows in scores.items() if math.fsum(of_rows) > total}
    return preferred(ahead, nll)[0] if ahead else pilot


def preferred(scores: Mapping[Choice, Sequence[float]], nll: Mapping[Choice, float]) -> list[Choice]:
    """Choices, best first: those near the highest mean score by teacher-forced NLL, then the others by score.

    Near: behind by one standard error of the paired difference at most. A few rows more of a few hundred are chance, while the
    NLL of the same rows separates the two.
    """
    total = {choice: math.fsum(of_rows) for choice, of_rows in scores.items()}  # exact: ties are ties
    best = max(scores, key=lambda choice: total[choice])

    def near(choice: Choice) -> bool:
        error = math.sqrt(math.fsum((b - a) ** 2 for a, b in zip(scores[choice], scores[best], strict=True)))
        return total[best] - total[choice] <= error

    def order(choice: Choice) -> tuple[bool, float, float]:
        likely = nll.get(choice, 0.0)
        return (False, likely, -total[choice]) if near(choice) else (True, -total[choice], likely)

    return sorted(scores, key=order)
