"""The evaluation: teacher-forced measures against the reference, completions, the choice of lambda, the report."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tc_ray.config.fusion import FusionSection
from tc_ray.evaluation.decode import HeldOut, complete, read_held_out
from tc_ray.evaluation.metric import ExactMatch
from tc_ray.evaluation.procedure import evaluate
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.statistics import Choice, Comparison, choose
from tc_ray.evaluation.teacher_forced import NLL_FLOOR, teacher_forced
from tc_ray.models.copilot import Copilot
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tests.support.family_samples import make_copilot, new_pilot
from tests.support.reference import copilot_f, dense_record, fused_logits
from tests.support.tiny_model import make_tiny_llama, make_tokenizer

CHOICES: list[Choice] = [("probability", 0.0), ("probability", 0.6), ("logits", 1.5)]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", scale=4.0)
    pilot = load_pilot(folder, dtype=torch.float32)
    with torch.no_grad():
        pilot.model.norm.weight.mul_(8.0)
    torch.manual_seed(6)
    copilot = Copilot.from_decoder(folder, [0, 1], pilot=pilot)
    with torch.no_grad():
        copilot.output.weight.normal_(std=0.4)
    return FusedModel.join(pilot, copilot)


def held_out(count: int = 7, seed: int = 2) -> list[HeldOut]:
    rng = np.random.default_rng(seed)
    return [
        HeldOut(i, rng.integers(2, 258, length).tolist(), int(rng.integers(2, length - 1)), "", f"prompt {i}")
        for i, length in enumerate(rng.integers(5, 16, count).tolist())
    ]


# -- teacher-forced -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "target"])
def test_teacher_forced_is_the_reference_s(fused: FusedModel, positions: str) -> None:
    examples = held_out()
    # batches of 3 and a rest; a row without gold tokens is left out
    without_gold = HeldOut(99, [5, 6, 7], 3, "", "")
    fused.copilot.config.positions = positions
    got = teacher_forced(fused, [*examples, without_gold], CHOICES, batch_size=3)

    rows: dict[Choice, list[tuple[float, float, bool]]] = {choice: [] for choice in CHOICES}
    for e in examples:
        dense = dense_record(fused.pilot, e.input_ids, e.target_start)
        first, last = (0 if positions == "all" else e.target_start - 1), len(e.input_ids) - 1
        states = dense.states[first:last].bfloat16().float()  # the Copilot is trained on what the log stores
        predicting = list(range(e.target_start - 1, last))
        with torch.no_grad():
            f = copilot_f(
                fused.copilot, e.input_ids[: e.target_start], states, list(range(first, last)), predicting, dense.errors
            )
        for (space, lam), kept in rows.items():
            for i, token in enumerate(e.input_ids[e.target_start :]):
                p = fused_logits(dense.logits[i], f[i], lam, space).softmax(-1)
                truth = torch.zeros_like(p)
                truth[token] = 1.0
                nll = -np.log(max(float(p[token]), NLL_FLOOR))
                kept.append((float(((truth - p) ** 2).sum()), nll, int(p.argmax()) == token))
    base = np.mean([row[0] for row in rows[CHOICES[0]]])
    assert got.keys() == rows.keys()
    for choice, kept in rows.items():
        squared, nll, right = np.mean(kept, axis=0)
        measured = got[choice]
        assert measured.tokens == len(kept)
        # 1e-3: a state on the middle between two bfloat16 numbers may be rounded either way
        assert measured.squared_error == pytest.approx(squared, rel=1e-3)
        assert measured.error_ratio == pytest.approx(squared / base, rel=1e-3)
        assert measured.nll == pytest.approx(nll, rel=1e-3)
        assert measured.token_accuracy == pytest.approx(right)
    assert got["probability", 0.0].error_ratio == pytest.approx(1.0)
    assert abs(got["probability", 0.6].error_ratio - 1) > 0.05, "the Copilot changed nothing"


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_measures(fused: FusedModel) -> None:
    """The states of a forward are kept in bf16, where another order of sums shows."""
    on_cpu = teacher_forced(fused, held_out(), CHOICES, batch_size=3)
    moved = copy.deepcopy(fused)
    moved = FusedModel.join(moved.pilot.to("cuda"), moved.copilot.to("cuda"), lam=0.5)
    for choice, found in teacher_forced(moved, held_out(), CHOICES, batch_size=3).items():
        assert (found.squared_error, found.nll) == pytest.approx(
            (on_cpu[choice].squared_error, on_cpu[choice].nll), rel=1e-2
        )


def test_nothing_to_measure_gives_nothing(fused: FusedModel) -> None:
    assert teacher_forced(fused, [HeldOut(1, [3, 4], 2, "x", "")], CHOICES, batch_size=2) == {}


# -- completions --------------------------------------------------------------------------------------------------


def test_completions_keep_the_order_and_ignore_the_batch(fused: FusedModel) -> None:
    examples, tokenizer = held_out(), make_tokenizer()
    settings: dict[str, Any] = {"lam": 0.6, "max_new_tokens": 8}
    batched = complete(fused, tokenizer, examples, batch_size=3, **settings)
    for example, text in zip(examples, batched, strict=True):
        out = fused.generate(torch.tensor([example.prompt_ids]), max_new_tokens=8, do_sample=False, lam=0.6)
        assert text == tokenizer.decode(out[0, len(example.prompt_ids) :], skip_special_tokens=True)
    assert len(set(batched)) > 3
    beams = complete(fused, tokenizer, examples, batch_size=3, num_beams=3, **settings)
    out = fused.generate(
        torch.tensor([examples[0].prompt_ids]), max_new_tokens=8, do_sample=False, lam=0.6, num_beams=3
    )
    assert beams[0] == tokenizer.decode(out[0, examples[0].target_start :], skip_special_tokens=True)
    assert beams != batched


def test_completions_of_an_encoder_decoder() -> None:
    """Sources of unlike lengths, padded on the right: as each alone, without the start token."""
    pilot, tokenizer = new_pilot("t5"), make_tokenizer()
    copilot, _ = make_copilot("t5")
    seq2seq = FusedModel.join(pilot, copilot)
    examples = [replace(e, input_ids=[*e.prompt_ids, 1], target_start=e.target_start + 1) for e in held_out()]
    together = complete(seq2seq, tokenizer, examples, batch_size=4, max_new_tokens=6, lam=0.8)
    for example, text in zip(examples, together, strict=True):
        out = seq2seq.generate(torch.tensor([example.prompt_ids]), max_new_tokens=6, do_sample=False, lam=0.8)
        assert text == tokenizer.decode(out[0, 1:], skip_special_tokens=True)
    assert len(set(together)) > 3
    assert together != complete(seq2seq, tokenizer, examples, batch_size=4, max_new_tokens=6, lam=0.0)


# -- the choice of lambda -----------------------------------------------------------------------------------------

PILOT: Choice = ("probability", 0.0)


def test_choice_takes_the_highest_accuracy() -> None:
    correct = {PILOT: [True, False, False], ("probability", 0.5): [True, True, False], ("logits", 1.0): [True] * 3}
    assert choose(correct, {}) == ("logits", 1.0)


def test_pilot_wins_every_tie() -> None:
    correct = {PILOT: [True, False], ("probability", 0.5): [False, True], ("logits", 1.0): [False, False]}
    assert choose(correct, {PILOT: 9.0, ("probability", 0.5): 0.1}) == PILOT


def test_tie_of_two_lambdas_goes_to_the_better_likelihood() -> None:
    correct = {PILOT: [False, False], ("probability", 0.5): [True, False], ("probability", 1.0): [False, True]}
    for better, worse in ((0.5, 1.0), (1.0, 0.5)):
        nll = {PILOT: 0.0, ("probability", better): 1.0, ("probability", worse): 1.5}
        assert choose(correct, nll) == ("probability", better)


def test_comparison_counts_pairs() -> None:
    found = Comparison.of([True, True, False, False, False], [True, False, True, True, False])
    assert found == Comparison(rows=5, pilot_correct=2, fused_correct=3, wins=2, losses=1)
    assert found.p_value == 1.0
    with pytest.raises(ValueError):
        Comparison.of([True], [True, False])


# -- the whole procedure ------------------------------------------------------------------------------------------


def answered(fused: FusedModel, lam: float) -> list[HeldOut]:
    """Held-out rows whose right answer is what lambda `lam` says."""
    examples = held_out(8, seed=4)
    texts = complete(fused, make_tokenizer(), examples, lam=lam, max_new_tokens=6, batch_size=8)
    return [replace(e, answer=text) for e, text in zip(examples, texts, strict=True)]


@pytest.mark.parametrize("right_lam", [0.0, 0.8])
def test_lambda_is_chosen_on_validation_and_applied_to_test(
    fused: FusedModel, monkeypatch: pytest.MonkeyPatch, right_lam: float
) -> None:
    """Answers that only one lambda gives: it is found on the validation rows, and the test rows are scored with it."""
    # the answers of an untrained model are no answers: whole texts are compared
    monkeypatch.setattr("tc_ray.evaluation.metric.matches", lambda text, answer: text == answer)
    rows = answered(fused, right_lam)
    said: list[str] = []
    config = FusionSection(lam_grid=[0.0, 0.3, 0.8], max_new_tokens=6, eval_batch_size=8)
    report = evaluate(
        fused,
        ExactMatch(make_tokenizer(), config),
        config,
        validation=rows[:5],
        test=rows[5:],
        data="made up",
        on_progress=said.append,
    )
    assert (report.lam, report.exported_lam) == (right_lam, right_lam)
    accuracies = {row["lam"]: row["right"] for row in report.validation}
    assert accuracies == {row["lam"]: row["score"] for row in report.validation}
    assert accuracies[right_lam] == 1.0
    assert max(a for lam, a in accuracies.items() if lam != right_lam) < 1.0
    if right_lam:
        assert report.helps
        assert (report.comparison.rows, report.comparison.fused_correct) == (3, 3)
        assert report.comparison.wins > 0 and report.comparison.losses == 0
        assert report.verdict.startswith("No gain is shown: +"), "so few wins can be chance"
        assert len(report.examples) == report.comparison.wins
        assert {example["prompt"] for example in report.examples} <= {row.prompt for row in rows[5:]}
    else:
        assert not report.helps
        assert report.comparison.wins == report.comparison.losses == 0
        assert "exported default is lambda 0" in report.verdict
    assert sum(line.startswith("evaluate: test") for line in said) == 1 + bool(right_lam), "the test rows are used once"


def test_validation_rows_are_needed(fused: FusedModel) -> None:
    with pytest.raises(ValueError, match=r"data\.validation"):
        metric = ExactMatch(make_tokenizer(), FusionSection())
        evaluate(fused, metric, FusionSection(), validation=[], test=held_out(), data="")


def test_lambda_that_loses_on_test_is_not_exported(tmp_path: Path) -> None:
    report = Report("rows", "probability", 0.5, "own", Comparison.of([True, True], [True, False]), None, None)
    assert report.exported_lam == 0.0
    assert "lambda 0.5, it won 0 and lost 1 of 2 test rows" in report.verdict
    report.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert (saved["exported_lam"], saved["lam"], saved["comparison"]["losses"]) == (0.0, 0.5, 1)
    assert report.verdict in (tmp_path / "evaluation.md").read_text()


# -- held-out rows ------------------------------------------------------------------------------------------------


def test_rows_without_answer_are_scored_against_their_completion(tmp_path: Path) -> None:
    def write(**changes: Any) -> Path:
        row = {"sample_id": 1, "input_ids": [2, 3, 4], "target_start": 2, "completion": "x = 4", "answer": None}
        row["prompt"] = "2 + 2"
        pq.write_table(pa.Table.from_pylist([row | changes] * 3), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    assert [e.answer for e in read_held_out(write(answer="4"), 2)] == ["4", "4"]
    (first, *_) = read_held_out(write())
    assert (first.answer, first.prompt_ids, first.prompt) == ("x = 4", [2, 3], "2 + 2")
    with pytest.raises(ValueError, match="row 0: neither `answer` nor `completion`"):
        read_held_out(write(completion=None))
