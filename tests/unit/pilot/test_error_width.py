"""`log.top_k: auto`: how long is measured, what is chosen, and what is told of it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.rows.records import Records
from tc_ray.models.pilot.token_errors import SparseErrors, full_errors, sparse_errors
from tc_ray.pilot.error_width import ErrorCurve, measured_rounds, told
from tests.support.mistakelog_samples import random_records

LISTED = 256
"""Errors listed a token while k is measured."""
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rounds", "expected", "sections"),
    [
        (100, 4, {}),
        (100, 6, {"log": {"top_k_rounds": 6}}),
        (100, 3, {"pilot": {"checkpoint_every_rounds": 3}}),
        (2, 2, {}),
        (100, 1, {"copilot": {"schedule": "lockstep"}}),
        (100, 2, {"log": {"queue_rounds": 2}}),
        (100, 0, {"log": {"top_k": 64}}),
        (100, 0, {"log": {"error": "dense"}}),
        (100, 0, {"log": {"enabled": False}}),
    ],
)
def test_measured_rounds(rounds: int, expected: int, sections: dict[str, Any]) -> None:
    assert measured_rounds(RunConfig.model_validate(sections), rounds) == expected


@pytest.mark.parametrize("norm", [1, 2])
def test_the_smallest_k_that_holds_the_share(norm: int) -> None:
    """Against |l| of all tokens, sorted token by token."""
    torch.manual_seed(2)
    log_probs, targets = (3 * torch.randn(40, 300)).log_softmax(-1), torch.randint(0, 300, (40,))
    errors = -log_probs.exp()
    errors[torch.arange(40), targets] += 1.0
    size = errors.abs().double()
    others = size.scatter(1, targets[:, None], 0.0).sort(1, descending=True).values
    ordered = torch.cat([size.gather(1, targets[:, None]), others], 1)
    curve = ErrorCurve(LISTED, CPU)
    for part in torch.arange(40).split(7):
        curve.add(sparse_errors(log_probs[part], targets[part], LISTED))
    for asked in (0.6, 0.9, 0.99, 0.999):
        k = curve.smallest(asked, norm)
        parts = [float(torch.linalg.vector_norm(ordered[:, : n + 1], norm, dim=1).sum()) for n in (k - 1, k)]
        held = [part / float(torch.linalg.vector_norm(size, norm, dim=1).sum()) for part in parts]
        assert (held[0] < asked or k == 1) and asked <= held[1]
        assert curve.captured(k, norm) == pytest.approx(held[1], rel=1e-6)
    assert curve.smallest(0.9999999999, 1) == LISTED
    two = ErrorCurve(LISTED, CPU)
    two.add(SparseErrors(torch.zeros(0, 257), torch.zeros(0, 257), torch.zeros(0)))
    assert two.smallest(0.999, norm) == 1 and two.captured(1, norm) == 1.0


def test_what_is_not_listed_never_flatters_the_share() -> None:
    """4 of 300 even errors are listed: the squares of the others are known by their sum and the smallest one listed."""
    log_probs, targets = torch.zeros(6, 300).log_softmax(-1), torch.zeros(6, dtype=torch.int64)
    curve = ErrorCurve(4, CPU)
    curve.add(sparse_errors(log_probs, targets, 4))
    size = torch.full((300,), 1 / 300).double()
    size[0] = 299 / 300
    assert curve.captured(4, 2) == pytest.approx(float(size[:5].norm() / size.norm()), rel=1e-6)
    uneven = torch.tensor([[0.0, 5, 4, 3, 2, 1, 0, -1]]).log_softmax(-1)
    curve = ErrorCurve(2, CPU)
    curve.add(sparse_errors(uneven, targets[:1], 2))
    true = full_errors(uneven, targets[:1]).values[0].abs().sort(descending=True).values
    share = float(true[:3].norm() / true.norm())
    assert 0.98 * share < curve.captured(2, 2) < share


def half_of_a_curve(rank: int, meeting: Path, out: Path) -> None:
    """In a process of its own: the tokens of one of two ranks."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    curve = curve_of(slice(rank, None, 2))
    curve.add_over_ranks()
    torch.save(curve.sums, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def curve_of(tokens: slice) -> ErrorCurve:
    """Of 40 tokens, the odd ones of which the Pilot is much surer of."""
    torch.manual_seed(6)
    log_probs = (torch.randn(40, 300) * (1 + 4 * (torch.arange(40) % 2))[:, None]).log_softmax(-1)[tokens]
    curve = ErrorCurve(LISTED, CPU)
    curve.add(sparse_errors(log_probs, torch.arange(40)[tokens], LISTED))
    return curve


def test_k_is_chosen_over_all_ranks(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=half_of_a_curve, args=(rank, tmp_path / "meeting", tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    whole, one, other = curve_of(slice(None)), curve_of(slice(0, None, 2)), curve_of(slice(1, None, 2))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole.sums, rtol=1e-12, atol=0)
    assert len({curve.smallest(0.9, 1) for curve in (whole, one, other)}) == 3, "the ranks' own choices would do"


def test_what_is_told_of_the_choice() -> None:
    curve = ErrorCurve(3, CPU)
    curve.sums[0] = torch.tensor([50.0, 80, 88, 90, 100])
    curve.sums[1] = torch.tensor([70.0, 99, 99.914, 99.9995, 100])
    log = RunConfig().log
    assert told(2, curve, log, 4) == (
        "the log keeps the 2 largest errors a token: 99.91% of |l| in rounds 1 to 4 (the Euclidean norm; 88.00% of the "
        "summed errors)"
    )
    assert "99.9995% of |l|" in told(3, curve, log, 4)
    summed = log.model_copy(update={"top_k_norm": 1, "top_k_limit": 3})
    short = told(3, curve, summed, 4)
    assert "90.00% of |l| in rounds 1 to 4 (the summed errors; 99.9995% of the Euclidean norm)" in short
    assert "less than the 99.9%" in short and "log.top_k_limit is 3" in short and "log.error=dense" in short
    standing = told(2, curve, summed, 4)
    assert "less than" in standing and "limit" not in standing


def test_truncated_is_what_the_smaller_k_would_have_listed() -> None:
    torch.manual_seed(3)
    log_probs, targets = (3 * torch.randn(30, 400)).log_softmax(-1), torch.randint(0, 400, (30,))
    base = random_records(8, seed=2)
    count = int(base.target_offsets[-1])
    made = {}
    for k in (LISTED, 5):
        e = sparse_errors(log_probs[:count], targets[:count], k)
        made[k] = Records(
            **{
                name: getattr(base, name)
                for name in Records.__dataclass_fields__
                if not name.startswith("error_") and name != "error"
            },
            error_ids=e.ids.int().numpy(),
            error_values=e.values.numpy(),
            error_rest=e.rest.numpy(),
        )
    cut = made[LISTED].truncated(5)
    np.testing.assert_array_equal(cut.error_ids, made[5].error_ids)
    np.testing.assert_array_equal(cut.error_values, made[5].error_values)
    np.testing.assert_allclose(cut.error_rest, made[5].error_rest, atol=1e-6)
    cut.validate()
    assert cut.truncated(5) is cut
    with pytest.raises(ValueError, match="the 6 largest of 5"):
        cut.truncated(6)
