"""Free text: chrF or a metric of the user chooses lambda and is reported as it is; what is said where exact match finds nothing."""

from __future__ import annotations

import string
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tc_ray.config.fusion import FusionSection
from tc_ray.evaluation.choose import Passes, choose_lambda
from tc_ray.evaluation.compare import POOLED
from tc_ray.evaluation.procedure import CHOICE_FILE, Task, evaluate
from tc_ray.evaluation.rows import read_results, results_file
from tc_ray.evaluation.statistics import sign_flip_p
from tc_ray.models.fusion import FusedModel
from tests.support.evaluation_samples import HerePool, held_out, row_set, source, tiny_fused
from tests.support.tiny_model import make_tokenizer

METRIC = "text_metrics:share"
FUSION = FusionSection(lam_grid=[0.0, 0.3, 0.8], space="logits", max_new_tokens=6)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    return tiny_fused(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the metric: the share of characters beyond z, which the models of random weights differ in."""
    (tmp_path / "text_metrics.py").write_text(
        "def share(said, row):\n    return 100 * sum(one > 'z' for one in said) / max(1, len(said))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("text_metrics", None)


def test_it_decides_among_what_is_decoded_and_is_reported(fused: FusedModel, tmp_path: Path) -> None:
    pool = HerePool(m=(fused, make_tokenizer()))
    rows = held_out(16, seed=4)
    task = Task(source(), [row_set(rows[8:], METRIC)], row_set(rows[:8], METRIC, name="validation"), tmp_path / "kept")
    report = evaluate([task], FUSION, pool.at(tmp_path), tmp_path)
    chosen = report.chosen["m"]
    decoded = {row["lam"]: row["score"] for row in chosen.grid if row["score"] is not None}
    assert len(decoded) == 3 and all(row["right"] is None for row in chosen.grid)
    assert decoded[chosen.lam] == max(decoded.values()) and (chosen.lam or decoded[0.0] == max(decoded.values()))
    assert [line.metric for line in report.measured] == [METRIC] * len(report.measured)
    line = report.measured[0]
    assert line.low <= line.value <= line.high and 1 < line.value <= 100
    text = "\n".join(report.lines())
    assert "share" in text and f"{line.value:.4f}" in text and f"{100 * line.value:.2f}" not in text
    for pair in report.pairs:
        assert (pair.wins, pair.metric) == (None, METRIC)

    # another function in the file is another choice
    kept = (tmp_path / "kept" / CHOICE_FILE).read_text()
    (tmp_path / "text_metrics.py").write_text("def share(said, row):\n    return 0.0\n")
    del sys.modules["text_metrics"]
    evaluate([task], FUSION, pool, tmp_path)
    assert (tmp_path / "kept" / CHOICE_FILE).read_text() != kept


def test_chrf_chooses_lambda_and_is_tested_in_pairs(fused: FusedModel, tmp_path: Path) -> None:
    """A measure by degrees: no wins and losses, p by chance signs, the interval by resampling rows."""
    rows = [replace(row, completion=string.ascii_letters + string.digits) for row in held_out(16, seed=4)]
    task = Task(source(), [row_set(rows[8:], "chrf")], row_set(rows[:8], "chrf", name="validation"), tmp_path / "kept")
    report = evaluate([task], FUSION, HerePool(m=(fused, make_tokenizer())).at(tmp_path), tmp_path)
    chosen = report.chosen["m"]
    decoded = {row["lam"]: row["score"] for row in chosen.grid if row["score"] is not None}
    assert len(decoded) == 3 and decoded[chosen.lam] == max(decoded.values()) > 0
    (pair,) = report.pairs
    before, after = (
        np.array([one.score for one in read_results(results_file(tmp_path, model, "test"))])
        for model in (pair.a, pair.b)
    )
    differences = after - before
    assert pair.difference == pytest.approx(differences.mean()) and (pair.wins, pair.losses) == (None, None)
    assert pair.p == sign_flip_p(differences) and pair.low <= pair.difference <= pair.high
    assert any("chrF" in line for line in report.lines())


def test_sets_of_one_own_metric_are_pooled_and_others_are_not(fused: FusedModel, tmp_path: Path) -> None:
    pool, rows = HerePool(m=(fused, make_tokenizer()), n=(fused, make_tokenizer())), held_out(6, seed=4)
    for other, pooled in ((METRIC, True), ("nll", False)):
        sets = [row_set(rows[:3], METRIC, "a"), row_set(rows[3:], other, "b")]
        tasks = [Task(source(name, fused=False), sets) for name in ("m", "n")]
        report = evaluate(tasks, FUSION, pool.at(tmp_path), tmp_path)
        found = [pair.rows for pair in report.pairs if pair.set == POOLED]
        assert found == ([6] if pooled else [])


def test_where_no_answer_is_right_the_report_says_what_to_do(fused: FusedModel, tmp_path: Path) -> None:
    passes = Passes(HerePool(m=(fused, make_tokenizer())).at(tmp_path), source(), FUSION, "own")
    rows = [replace(row, answer="a text that no model says") for row in held_out(5)]
    chosen = choose_lambda(passes, row_set(rows))
    assert chosen.lam == 0
    assert chosen.how.endswith(
        "no answer was right with any lambda: for free text choose by fusion.metric chrf or nll, or a metric of your own"
    )
    assert "free text" not in choose_lambda(passes, row_set(rows, "nll")).how
