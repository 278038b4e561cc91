"""The choice of lambda: the rule, the pre-selection by teacher forcing, the whole procedure for each metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tc_ray.config.fusion import FusionSection
from tc_ray.data.prepared.folder import LeftOut
from tc_ray.evaluation.choose import Passes, choose_lambda, grid_of
from tc_ray.evaluation.decode import completions
from tc_ray.evaluation.procedure import CHOICE_FILE, NoValidationError, Task, evaluate
from tc_ray.evaluation.rows import HeldOut, read_results, results_file
from tc_ray.evaluation.statistics import Choice, Comparison, choose, preferred
from tc_ray.evaluation.teacher_forced import Text, text_measures
from tc_ray.models.folder import FusionSettings
from tc_ray.models.fusion import FusedModel
from tests.support.evaluation_samples import HerePool, held_out, row_set, source, tiny_fused
from tests.support.tiny_model import make_tokenizer

PILOT: Choice = ("probability", 0.0)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    return tiny_fused(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of an untrained model are no answers: whole texts are compared."""
    monkeypatch.setattr("tc_ray.evaluation.scores.matches", lambda text, answer: text == answer)


# -- the rule -----------------------------------------------------------------------------------------------------


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


def test_a_near_tie_goes_to_the_better_likelihood() -> None:
    """Three rows of a few hundred are chance. One row more than another that has no row of its own is near, two are not."""
    best, near, far = ("probability", 0.8), ("logits", 1.0), ("logits", 0.1)
    nll = {PILOT: 0.32, best: 0.34, near: 0.31, far: 0.30}
    pilot = [0.0] * 9
    correct = {PILOT: pilot, best: [1.0] * 4 + [0.0] * 5, near: [1.0] * 3 + [0.0] * 6, far: [1.0] * 2 + [0.0] * 7}
    assert choose(correct, nll) == near
    assert preferred({c: correct[c] for c in (best, near, far)}, nll) == [near, best, far]
    # five rows against three others are near too: sqrt(8) is more than 2
    correct |= {best: [1.0] * 5 + [0.0] * 4, near: [0.0] * 6 + [1.0] * 3}
    assert choose(correct, nll) == near
    # what is near the best but no better than the Pilot is not chosen
    correct |= {PILOT: [0.0] * 8 + [1.0], best: [1.0] * 2 + [0.0] * 7, near: [0.0] * 2 + [1.0] + [0.0] * 6, far: pilot}
    assert choose(correct, nll) == best


def test_scores_tie_exactly() -> None:
    pilot, low, high = ("probability", 0.0), ("probability", 0.1), ("logits", 1.0)
    third = [1 / 3] * 3
    assert choose({pilot: [1.0, 0.0], low: [0.0, 1.0], high: [0.5, 0.4]}, {}) == pilot
    assert choose({pilot: third, low: [1.0, 0.0, 0.1], high: [0.5, 0.5, 0.2]}, {}) == high
    # 0.1 + 0.2 + 0.3 depends on the order in floating point; a tie must not
    assert choose({pilot: [0.3, 0.2, 0.1], low: [0.1, 0.2, 0.3]}, {pilot: 2.0, low: 0.1}) == pilot


def test_comparison_counts_pairs() -> None:
    found = Comparison.of([True, True, False, False, False], [True, False, True, True, False])
    assert found == Comparison(rows=5, wins=2, losses=1)
    assert found.p_value == 1.0 and found.difference == pytest.approx(0.2)
    with pytest.raises(ValueError):
        Comparison.of([True], [True, False])


# -- the grid, then the best decoded ------------------------------------------------------------------------------


def passes(pool: HerePool, folder: Path, fusion: FusionSection) -> Passes:
    return Passes(pool.at(folder), source(), fusion, fusion.feedback)


def said_with(model: FusedModel, rows: Sequence[HeldOut], choice: Choice) -> list[HeldOut]:
    """The rows with the answer, and as gold completion, what the model says with this choice."""
    tokenizer = make_tokenizer()
    texts = completions(model, tokenizer, rows, [choice], max_new_tokens=6)
    made = []
    model.space = choice[0]
    for row, (text,) in zip(rows, texts, strict=True):
        ids = torch.tensor([row.prompt_ids])
        gold = model.generate(ids, lam=choice[1], max_new_tokens=6, do_sample=False)[0].tolist()
        made.append(replace(row, answer=text, input_ids=gold))
    return made


def test_only_the_two_best_and_zero_are_decoded(fused: FusedModel, tmp_path: Path) -> None:
    """Gold tokens are those of one choice, so teacher forcing puts it in front; its numbers are computed a second time."""
    rows = said_with(fused, held_out(10, seed=4), ("logits", 0.8))
    fusion = FusionSection(lam_grid=[0.0, 0.1, 0.3, 0.8], space="choose", max_new_tokens=6)
    pool = HerePool(m=(fused, make_tokenizer()))
    chosen = choose_lambda(passes(pool, tmp_path, fusion), row_set(rows, left_out=LeftOut(bad=1)))
    assert chosen.how == "chosen on 10 of 11 validation rows (1 bad, see quarantine.jsonl)"
    choices = grid_of(fusion)
    assert [(row["space"], row["lam"]) for row in chosen.grid] == choices and len(choices) == 7
    sums = text_measures(fused, [Text(row.input_ids, row.target_start) for row in rows], choices, batch_size=4)
    tokens = [len(row.input_ids) - row.target_start for row in rows]
    for number, row in enumerate(chosen.grid):
        assert row["nll"] == pytest.approx(sums[:, number, 1].sum() / sum(tokens), rel=1e-4)
        assert row["error_ratio"] == pytest.approx(sums[:, number, 0].sum() / sums[:, 0, 0].sum(), rel=1e-4)
        assert row["forced"] == pytest.approx(sum(sums[:, number, 2] == tokens) / len(rows))
    decoded = [row for row in chosen.grid if row["score"] is not None]
    assert len(decoded) == 3 and decoded[0]["lam"] == 0
    first = {choice: (sums[:, number, 2] == tokens).tolist() for number, choice in enumerate(choices) if number}
    nll = {choice: sums[:, number, 1].sum() for number, choice in enumerate(choices)}
    assert {(row["space"], row["lam"]) for row in decoded[1:]} == set(preferred(first, nll)[:2])
    said = next(job for job in pool.passes if job.kind == "said")
    assert len(said.choices) == 3
    assert chosen.choice == ("logits", 0.8) and chosen.rows == 10
    for row in decoded:
        texts = completions(fused, make_tokenizer(), rows, [(row["space"], row["lam"])], max_new_tokens=6)
        assert row["right"] == sum(text == one.answer for (text,), one in zip(texts, rows, strict=True)) / 10


def test_without_gold_tokens_the_whole_grid_is_decoded(fused: FusedModel, tmp_path: Path) -> None:
    rows = [replace(row, input_ids=row.prompt_ids) for row in said_with(fused, held_out(6), ("probability", 0.8))]
    fusion = FusionSection(lam_grid=[0.0, 0.1, 0.3, 0.8], max_new_tokens=6)
    pool = HerePool(m=(fused, make_tokenizer()))
    chosen = choose_lambda(passes(pool, tmp_path, fusion), row_set(rows))
    assert chosen.lam == 0.8 and [row["score"] is not None for row in chosen.grid] == [True] * 4
    assert chosen.grid[0]["nll"] is None


@pytest.mark.parametrize("metric", ["choice", "nll"])
def test_choice_and_nll_need_no_decoding(fused: FusedModel, tmp_path: Path, metric: Any) -> None:
    gold = said_with(fused, held_out(8, seed=5), ("logits", 0.8))
    rows = [replace(row, options=(row.answer, row.answer + "x", "zz")) for row in gold]
    fusion = FusionSection(lam_grid=[0.0, 0.3, 0.8, 1.5], space="logits", max_new_tokens=6)
    pool = HerePool(m=(fused, make_tokenizer()))
    chosen = choose_lambda(passes(pool, tmp_path, fusion), row_set(rows, metric))
    assert {job.kind for job in pool.passes} == {"options" if metric == "choice" else "forced"}
    assert all(row["score"] is not None for row in chosen.grid)
    if metric == "nll":
        sums = text_measures(
            fused, [Text(row.input_ids, row.target_start) for row in rows], grid_of(fusion), batch_size=8
        )
        assert chosen.lam == grid_of(fusion)[int(sums[:, :, 1].sum(0).argmin())][1] > 0


# -- the whole procedure ------------------------------------------------------------------------------------------


def measure(fused: FusedModel, folder: Path, lam: float, **options: Any) -> tuple[Any, HerePool]:
    rows = said_with(fused, held_out(16, seed=4), ("probability", lam))
    fusion = FusionSection(lam_grid=[0.0, 0.3, 0.8], max_new_tokens=6)
    pool = HerePool(m=(fused, make_tokenizer()))
    task = Task(
        options.pop("source", source()), [row_set(rows[8:])], row_set(rows[:8], name="validation"), folder / "kept"
    )
    return evaluate([task], fusion, pool.at(folder), folder, **options), pool


@pytest.mark.parametrize("right_lam", [0.0, 0.8])
def test_lambda_is_chosen_on_validation_and_applied_to_test(
    fused: FusedModel, right_lam: float, tmp_path: Path
) -> None:
    """Answers that only one lambda gives: it is found on the validation rows, and the test rows are decoded once."""
    report, pool = measure(fused, tmp_path, right_lam, exports=True)
    verdict = report.first
    assert (verdict.chosen.lam, verdict.exported_lam) == (right_lam, right_lam)
    accuracies = {row["lam"]: row["right"] for row in verdict.chosen.grid}
    assert accuracies[right_lam] == 1.0 and max(a for lam, a in accuracies.items() if lam != right_lam) < 1.0
    on_test = [job for job in pool.passes if job.rows.name == "test" and job.kind == "said"]
    assert [job.choices for job in on_test] == [(PILOT, ("probability", 0.8)) if right_lam else (PILOT,)]
    pilot, lines = report.measured
    assert (pilot.model, lines.model, pilot.lam, lines.lam) == ("m/pilot", "m", 0.0, right_lam)
    if right_lam:
        assert (lines.rows, lines.value) == (8, 1.0) and pilot.value < 1.0
        assert verdict.pair is not None and verdict.pair.losses == 0
        assert len(report.examples) == verdict.pair.wins > 0
        assert str(verdict).startswith(("No gain is shown: +", "The Copilot helps: +"))
    else:
        assert not verdict.helps and "exported default is lambda 0" in str(verdict)
        assert read_results(results_file(tmp_path, "m", "test")) == read_results(
            results_file(tmp_path, "m/pilot", "test")
        )


def test_a_choice_is_kept_until_what_decides_it_changes(fused: FusedModel, tmp_path: Path) -> None:
    measure(fused, tmp_path, 0.8)
    _, again = measure(fused, tmp_path, 0.8)
    assert {job.rows.name for job in again.passes} == {"test"}, "the choice was made before"
    _, asked = measure(fused, tmp_path, 0.8, choose_again=True)
    assert {job.rows.name for job in asked.passes} == {"test", "validation"}
    _, other = measure(fused, tmp_path, 0.8, source=replace(source(), weights="others"))
    assert {job.rows.name for job in other.passes} == {"test", "validation"}
    (tmp_path / "kept" / CHOICE_FILE).write_text('{"key": "x"')
    report, damaged = measure(fused, tmp_path, 0.8)
    assert {job.rows.name for job in damaged.passes} == {"test", "validation"} and report.first.chosen.lam == 0.8
    assert json.loads((tmp_path / "kept" / CHOICE_FILE).read_text())["chosen"]["lam"] == 0.8


def test_an_exported_model_has_its_choice(fused: FusedModel, tmp_path: Path) -> None:
    exported = replace(source(), settings=FusionSettings(0.3, "logits", "own"))
    report, pool = measure(fused, tmp_path, 0.8, source=exported)
    assert report.first.chosen.choice == ("logits", 0.3) and report.first.chosen.how == "as exported"
    assert all(job.rows.name == "test" for job in pool.passes)
    assert "exported default" not in str(report.first)
    zero = replace(source(), settings=FusionSettings(0.0, "logits", "own"))
    assert str(measure(fused, tmp_path, 0.8, source=zero)[0].first) == "The fused model is its Pilot: lambda is 0."
    chosen_again, _ = measure(fused, tmp_path, 0.8, source=exported, choose_again=True)
    assert chosen_again.first.chosen.choice == ("probability", 0.8)


def test_validation_rows_are_needed(fused: FusedModel, tmp_path: Path) -> None:
    pool = HerePool(m=(fused, make_tokenizer()))
    with pytest.raises(NoValidationError, match=r"data\.validation"):
        evaluate([Task(source(), [row_set(held_out())])], FusionSection(), pool.at(tmp_path), tmp_path)


def test_a_pilot_alone_is_measured_and_the_report_says_why(fused: FusedModel, tmp_path: Path) -> None:
    """Fault 10: a row whose answer is what the Pilot says is right, another is not; no word of a fused model."""
    rows = said_with(fused, held_out(3), PILOT)
    rows[1] = replace(rows[1], answer="no such thing")
    pool = HerePool(m=(fused.pilot, make_tokenizer()))
    task = Task(source(fused=False, no_copilot="it failed"), [row_set(rows)])
    report = evaluate([task], FusionSection(max_new_tokens=6), pool.at(tmp_path), tmp_path, exports=True)
    (line,) = report.measured
    assert (line.model, line.rows, line.value) == ("m", 3, pytest.approx(2 / 3))
    verdict = report.first
    assert (verdict.chosen.lam, verdict.exported_lam, verdict.helps) == (0.0, 0.0, False)
    assert str(verdict) == (
        "There is no Copilot: it failed. The Pilot alone was measured, and is exported with lambda 0."
    )
    assert "fused" not in "\n".join(report.lines()) and "lambda" not in "\n".join(report.tables())
    assert report.to_dict()["sources"]["m"]["no_copilot"] == "it failed"
    report.save(tmp_path)
    assert str(verdict) in (tmp_path / "report.md").read_text()


def test_a_run_s_own_settings_choose_beside_another_run(fused: FusedModel, tmp_path: Path) -> None:
    """b was trained with another grid and feedback than a, by whose settings all are measured; its kept choice counts."""
    rows = said_with(fused, held_out(16, seed=4), ("probability", 0.8))
    own = FusionSection(lam_grid=[0.0, 0.4, 0.8], feedback="realised", max_new_tokens=6)
    first = FusionSection(lam_grid=[0.0, 0.3], space="logits", max_new_tokens=5)
    test, validation = [row_set(rows[8:])], row_set(rows[:8], name="validation")

    def task(name: str, fusion: FusionSection) -> Task:
        return Task(source(name), test, validation, tmp_path / name, fusion)

    models = {name: (fused, make_tokenizer()) for name in "ab"}
    alone = evaluate([task("b", own)], own, HerePool(b=models["b"]).at(tmp_path), tmp_path)
    pool = HerePool(**models)
    both = evaluate([task("a", first), task("b", own)], first, pool.at(tmp_path), tmp_path)
    assert both.chosen["b"] == alone.chosen["b"] and both.chosen["b"].feedback == "realised"
    of_b = [job for job in pool.passes if job.source.name == "b"]
    assert {job.rows.name for job in of_b} == {"test"}, "it was chosen before"
    assert {(job.feedback, job.max_new_tokens) for job in of_b if job.kind == "said"} == {("realised", 5)}
