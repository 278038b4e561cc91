"""Teacher-forced measures against a slow reference, row by row."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tc_ray.evaluation.statistics import Choice
from tc_ray.evaluation.teacher_forced import NLL_FLOOR, TARGETS, TINY, Text, _Given, text_measures
from tc_ray.models.fusion import FusedModel, fuse
from tests.support.evaluation_samples import held_out, tiny_fused
from tests.support.reference import copilot_f, dense_record, fused_logits

CHOICES: list[Choice] = [("probability", 0.0), ("probability", 0.6), ("logits", 1.5), ("logits", 9.0)]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    return tiny_fused(tmp_path_factory.mktemp("tiny"))


def texts(count: int = 7) -> list[Text]:
    return [Text(row.input_ids, row.target_start) for row in held_out(count)]


@pytest.mark.parametrize(
    ("positions", "outputs", "question"),
    [("all", 258, "ids"), ("target", 258, "ids"), ("all", 140, "ids"), ("all", 258, "states")],
)
def test_measures_are_the_reference_s(
    tmp_path: Path, positions: str, outputs: int, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 3 and of few tokens; f on all tokens or on some; X~ of the Pilot as it is now; a text without tokens to measure
    is 0."""
    monkeypatch.setattr("tc_ray.evaluation.teacher_forced.TARGETS", 12)
    ids = torch.randperm(258, generator=torch.Generator().manual_seed(1))[:outputs].sort().values
    fused = tiny_fused(tmp_path, output_ids=ids, question=question)
    fused.copilot.config.positions = positions
    embedding = fused.pilot.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(embedding.roll(1, 0))  # full fine-tuning moves it away from what the Copilot began with
    got = text_measures(fused, [*texts(), Text([5, 6, 7], 3)], CHOICES, batch_size=3)
    assert got.shape == (8, 4, 3) and not got[7].any()
    for text, of_text in zip(texts(), got, strict=False):
        dense = dense_record(fused.pilot, text.ids, text.start)
        first, last = (0 if positions == "all" else text.start - 1), len(text.ids) - 1
        states = dense.states[first:last].bfloat16().float()  # the Copilot is trained on what the log stores
        predicting = list(range(text.start - 1, last))
        prompt, places = text.ids[: text.start], list(range(first, last))
        asked = embedding.detach()[prompt].bfloat16().float() if question == "states" else None
        with torch.no_grad():
            f = copilot_f(fused.copilot, prompt, states, places, predicting, dense.errors, asked=asked)
        for (space, lam), measured in zip(CHOICES, of_text, strict=True):
            kept = []
            for i, token in enumerate(text.ids[text.start :]):
                p = fused_logits(dense.logits[i], f[i], lam, space).softmax(-1)
                truth = torch.zeros_like(p)
                truth[token] = 1.0
                nll = -np.log(max(float(p[token]), NLL_FLOOR))
                kept.append((float(((truth - p) ** 2).sum()), nll, int(p.argmax()) == token))
            squared, nll, right = np.sum(kept, axis=0)
            # 1e-3: a state on the middle between two bfloat16 numbers may be rounded either way
            assert measured[0] == pytest.approx(squared, rel=1e-3)
            assert measured[1] == pytest.approx(nll, rel=1e-3)
            assert measured[2] == right
    assert abs(got[:, 1, 0].sum() / got[:, 0, 0].sum() - 1) > 0.05, "the Copilot changed nothing"


def test_a_pilot_alone_is_lambda_zero(fused: FusedModel) -> None:
    alone = text_measures(fused.pilot, texts(), CHOICES[:1], batch_size=4)
    np.testing.assert_allclose(alone, text_measures(fused, texts(), CHOICES[:1], batch_size=4), rtol=1e-5)


def test_unlikely_tokens_stop_at_the_floor(fused: FusedModel) -> None:
    """A clamped p~ is 0; options are compared with a floor that is no part of them."""
    usual = text_measures(fused, texts(), [("probability", 4.0)], batch_size=8)
    deeper = text_measures(fused, texts(), [("probability", 4.0)], batch_size=8, floor=TINY)
    assert deeper[:, 0, 1].max() > usual[:, 0, 1].max() > -np.log(NLL_FLOOR) - 1e-6
    np.testing.assert_allclose(usual[:, 0, 0], deeper[:, 0, 0])


def test_a_text_of_more_tokens_than_a_pass_holds_is_measured(fused: FusedModel) -> None:
    ids = torch.randint(2, 258, (1, 450), generator=torch.Generator().manual_seed(3))[0].tolist()
    found = text_measures(fused.pilot, [Text(ids, 2), Text(ids[:9], 2)], CHOICES[:1], batch_size=8)
    assert len(ids) < TARGETS and found[0, 0, 1] > found[1, 0, 1] > 0


def test_where_the_correction_takes_everything_away_p_stays() -> None:
    """As `fuse` does it: all tokens are reached, and every p + lam f is below 0."""
    log_probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
    f = torch.tensor([[-1.0, -1.0, -1.0], [0.0, 0.5, 0.0]])
    given = _Given.of(log_probs, torch.tensor([0, 1]), torch.arange(3), f)
    for space, lam in (("probability", 1.0), ("logits", 1.0), ("probability", 0.0)):
        squared, nats, first = given.measures(space, lam, NLL_FLOOR)
        p = fuse(log_probs, f, torch.full((2,), lam), space).softmax(-1)
        truth = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
        torch.testing.assert_close(squared, (truth - p).square().sum(1))
        torch.testing.assert_close(nats, -torch.stack([p[0, 0], p[1, 1]]).log())
        assert first.tolist() == [1.0, float(p[1].argmax() == 1)]


def test_of_equal_tokens_the_first_is_ranked_first() -> None:
    """As argmax does it, whether both are reached by f, one or none."""
    log_probs = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
    for reached in ([], [1, 2], [0, 3], [0, 1, 2, 3]):
        columns = torch.tensor(reached, dtype=torch.int64)
        for target in range(4):
            given = _Given.of(log_probs, torch.tensor([target]), columns, torch.zeros(1, len(reached)))
            assert given.measures("probability", 1.0, NLL_FLOOR)[2].tolist() == [float(target == 0)]


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_measures(fused: FusedModel) -> None:
    """The states of a forward are kept in bf16, where another order of sums shows."""
    on_cpu = text_measures(fused, texts(), CHOICES, batch_size=3)
    moved = copy.deepcopy(fused)
    moved = FusedModel.join(moved.pilot.to("cuda"), moved.copilot.to("cuda"), lam=0.5)
    np.testing.assert_allclose(text_measures(moved, texts(), CHOICES, batch_size=3), on_cpu, rtol=1e-2)
