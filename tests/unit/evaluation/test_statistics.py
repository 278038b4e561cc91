"""Intervals and the paired test, against published values, exact enumeration and simulation."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from tc_ray.evaluation.statistics import (
    bootstrap_intervals,
    holm,
    mcnemar_p,
    paired_difference_interval,
    sign_flip_p,
    wilson_interval,
)


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
    began = time.process_time()
    assert mcnemar_p(5000, 5000) == 1.0
    assert time.process_time() - began < 1, "a report has such a test for any two models"


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


def test_holm_by_hand() -> None:
    # Holm 1979: the smallest p times 4, the next times 3, ...; never below an earlier one
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_false_findings_rare() -> None:
    draw = np.random.default_rng(4)
    found = sum(min(holm(draw.random(10).tolist())) < 0.05 for _ in range(2000))
    assert 0.03 < found / 2000 < 0.07


def test_chance_signs_against_all_of_them() -> None:
    """Few enough differences to go through every combination of signs."""
    differences = np.array([0.3, -0.1, 0.25, 0.4, 0.05, -0.02, 0.2, 0.0])
    used = differences[differences != 0]
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, used, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(used))
    ]
    exact = np.mean([total >= abs(used.sum()) - 1e-12 for total in sums])
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.full(40, 0.5)) == pytest.approx(1e-4)
    assert sign_flip_p(np.ones(40)) == pytest.approx(2.0**-39), "whole numbers: no draw"


def test_a_weighted_bootstrap_is_of_the_weighted_mean() -> None:
    draw = np.random.default_rng(5)
    values, weights = draw.random((300, 1)), draw.integers(1, 9, 300).astype(float)
    ((low, high),) = bootstrap_intervals(values, weights=weights)
    mean = float(np.average(values[:, 0], weights=weights))
    # the delta method's standard error of a ratio of means
    error = float(np.sqrt(np.sum((weights * (values[:, 0] - mean)) ** 2)) / weights.sum())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
