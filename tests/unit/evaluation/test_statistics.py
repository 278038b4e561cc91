"""Intervals and the paired test, against published values, exact enumeration and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tc_ray.evaluation.statistics import mcnemar_p, paired_difference_interval, wilson_interval


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    for successes, rows, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson_interval(successes, rows) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(5, 5)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_binomial_tail() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 5) == 1.0
    assert mcnemar_p(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_p(2, 9) == mcnemar_p(9, 2) == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert mcnemar_p(35, 5) < 1e-5
    assert 0 <= mcnemar_p(3000, 2000) < 1e-9


def test_paired_interval_agrees_with_mcnemar_at_zero() -> None:
    # The interval excludes 0 exactly when the uncorrected McNemar statistic exceeds its 95% point.
    for wins in range(0, 30, 3):
        for losses in range(0, 30, 3):
            low, high = paired_difference_interval(wins, losses, 100)
            statistic = (wins - losses) / math.sqrt(wins + losses) if wins + losses else 0.0
            assert (low > 0) == (statistic > 1.96), (wins, losses)
            assert (high < 0) == (statistic < -1.96), (wins, losses)
            assert low <= (wins - losses) / 100 <= high
            assert paired_difference_interval(losses, wins, 100) == pytest.approx((-high, -low), abs=1e-9)


def test_paired_interval_covers() -> None:
    random = np.random.default_rng(1)
    wins_p, losses_p, rows, hits = 0.08, 0.03, 200, 0
    for wins, losses, _ in random.multinomial(rows, [wins_p, losses_p, 1 - wins_p - losses_p], size=2000):
        low, high = paired_difference_interval(int(wins), int(losses), rows)
        hits += low <= wins_p - losses_p <= high
    assert 0.935 <= hits / 2000 <= 0.97


def test_paired_interval_of_nothing_changed_and_of_everything() -> None:
    low, high = paired_difference_interval(0, 0, 100)
    assert low == pytest.approx(-high) and 0.03 < high < 0.05
    assert paired_difference_interval(10, 0, 10)[1] == pytest.approx(1.0)
