"""The forms that jobs/benchmarks/log_forms.py rewrites a log into are what a run with that setting logs."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.models.pilot.step import sparse_errors
from tests.support.mistakelog_samples import assert_same
from tests.unit.pilot.test_record_conversion import forward, records_of

SCRIPT = Path(__file__).resolve().parents[3] / "jobs" / "benchmarks" / "log_forms.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    path = list(sys.path)
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path[:] = path


def test_states_of_targets_are_what_positions_target_logs(script: dict[str, Any]) -> None:
    step = forward("llama")
    every, target = records_of(step, "all"), records_of(step, "target")
    assert len(every.rationale) > len(target.rationale)
    assert_same(script["in_form"](every, "positions=target"), target)


def test_fewer_errors_are_what_a_smaller_top_k_logs(script: dict[str, Any]) -> None:
    made = records_of(forward("llama"))
    count = len(made.error_ids)
    log_probs = (4 * torch.randn(count, 50, generator=torch.manual_seed(0))).log_softmax(-1)
    many, few = (sparse_errors(log_probs, torch.arange(count), k) for k in (20, 3))
    given = {"error_ids": many.ids.int().numpy(), "error_values": many.values.numpy(), "error_rest": many.rest.numpy()}
    cut = script["in_form"](dataclasses.replace(made, **given), "top-k=3,states=int8")
    np.testing.assert_array_equal(cut.error_ids, few.ids.numpy())
    np.testing.assert_array_equal(cut.error_values, few.values.numpy())
    np.testing.assert_allclose(cut.error_rest, few.rest.numpy(), atol=1e-6)
    assert cut.rationale_dtype == "int8"


def test_the_best_ratio_and_its_interval(script: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((200, 8))
    good, bad = truth + rng.standard_normal((200, 8)), rng.standard_normal((200, 8))

    def sums(found: np.ndarray) -> np.ndarray:
        return np.stack([(truth * truth).sum(1), (truth * found).sum(1), (found * found).sum(1)], 1)

    grid = [0.0, 0.25, 0.5, 1.0]
    expected = min(((truth - lam * good) ** 2).sum() / (truth**2).sum() for lam in grid)
    assert script["best_ratio"](sums(good).sum(0), grid) == pytest.approx(expected)
    found = script["intervals"]({"good": sums(good)[None], "bad": sums(bad)[None]}, grid)
    assert found["good"] == [0.0, 0.0] and found["bad"][0] > 0.2
