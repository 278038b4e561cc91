"""The report: its numbers from the files of rows, computed a second time; verdicts; JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tc_ray.config.section import Metric
from tc_ray.data.prepared.folder import LeftOut
from tc_ray.evaluation.compare import POOLED, Pair, averages, line_of, pairs_of
from tc_ray.evaluation.report import COLUMNS, Report
from tc_ray.evaluation.rows import RowResult, RowSet, read_results, results_file, write_results
from tests.support.evaluation_samples import held_out, report_of, row_set

MODELS = ("m/pilot", "m", "other")
SETS: dict[str, Metric] = {"one": "exact_match", "two": "choice", "items": "ranking", "text": "nll"}
ROWS = 60


def made_up(metric: Metric, seed: int) -> list[RowResult]:
    draw = np.random.default_rng(seed)
    found = []
    for number in range(ROWS):
        nll, tokens = float(draw.exponential()), int(draw.integers(1, 9))
        right = None if metric == "nll" else bool(draw.random() < 0.4 + 0.05 * (seed % 7))
        score, measures = float(bool(right)), {}
        if metric == "ranking":
            place = int(draw.integers(0, 30))
            measures = {"place": float(place)}
            right, score = 0 < place <= 10, 1 / math.log2(place + 1) if 0 < place <= 10 else 0.0
        elif metric == "choice":
            measures = {f"accuracy by {by}": float(draw.random() < 0.5) for by in ("sum", "token", "character")}
        elif metric == "nll":
            score = -nll
        error, first = float(draw.random() * tokens), int(draw.integers(0, tokens + 1))
        found.append(RowResult(number, number, right, score, nll, tokens, f"said {number}", error, first, measures))
    return found


@pytest.fixture
def report(tmp_path: Path) -> Report:
    sets = [row_set(held_out(ROWS), metric, name, left_out=LeftOut(bad=2)) for name, metric in SETS.items()]
    results = {
        model: {name: made_up(metric, 10 * i + j) for j, (name, metric) in enumerate(SETS.items())}
        for i, model in enumerate(MODELS)
    }
    for model, by_set in results.items():
        for name, rows in by_set.items():
            write_results(results_file(tmp_path, model, name), rows)
    lines = [
        line_of(
            model,
            rows,
            results[model][rows.name],
            results["m/pilot"][rows.name],
            ("logits", 0.5 * (model == "m")),
            [5, 10],
        )
        for model in MODELS
        for rows in sets
    ]
    found = report_of(lines, pairs_of(results, sets), 0.5)
    found.save(tmp_path)
    return found


def test_the_numbers_follow_from_the_rows(report: Report, tmp_path: Path) -> None:
    """Every line of report.csv and report.json, from rows/*.jsonl alone."""
    with (tmp_path / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS and len(table) == len(MODELS) * len(SETS)
    saved = json.loads((tmp_path / "report.json").read_text())["results"]
    base = {name: read_results(results_file(tmp_path, "m/pilot", name)) for name in SETS}
    for line in table:
        rows = read_results(results_file(tmp_path, line["model"], line["set"]))
        tokens = np.array([row.tokens for row in rows])
        nats = np.array([row.nll or 0.0 for row in rows]) * tokens
        if line["metric"] in ("exact_match", "choice"):
            value = np.mean([bool(row.right) for row in rows])
        elif line["metric"] == "nll":
            value = nats.sum() / tokens.sum()
        else:
            value = np.mean([row.score for row in rows])
        assert float(line["value"]) == pytest.approx(value)
        assert float(line["low"]) < value < float(line["high"])
        assert float(line["nll"]) == pytest.approx(nats.sum() / tokens.sum())
        errors = [sum(row.squared_error or 0 for row in one) for one in (rows, base[line["set"]])]
        assert float(line["error_ratio"]) == pytest.approx(errors[0] / errors[1])
        assert float(line["token_accuracy"]) == pytest.approx(sum(row.first for row in rows) / tokens.sum())
        assert (line["rows"], line["left_out"]) == (str(ROWS), "2")
        assert saved[line["model"]][line["set"]]["value"] == pytest.approx(value)
    hits = saved["m"]["items"]["measures"]
    places = [int(row.measures["place"]) for row in read_results(results_file(tmp_path, "m", "items"))]
    assert hits["Hit@5"]["value"] == pytest.approx(np.mean([0 < place <= 5 for place in places]))
    assert list(hits) == ["Hit@5", "Hit@10", "NDCG@5", "NDCG@10"]
    assert list(saved["m"]["two"]["measures"]) == ["accuracy by sum", "accuracy by token", "accuracy by character"]
    for model, mean in averages(report.measured).items():
        assert mean == pytest.approx(np.mean([saved[model][name]["value"] for name in ("one", "two", "items")]))


def binomial_p(wins: int, losses: int) -> float:
    total = wins + losses
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(min(wins, losses) + 1)) / 2**total)


def test_any_two_models_are_tested_on_each_set_and_on_all(report: Report, tmp_path: Path) -> None:
    pairs = json.loads((tmp_path / "report.json").read_text())["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs if pair["set"] == "one"] == list(combinations(MODELS, 2))
    assert len(pairs) == 3 * (len(SETS) + 1)
    for pair in pairs:
        names = ["one", "two", "items"] if pair["set"] == POOLED else [pair["set"]]
        a, b = (
            [row for name in names for row in read_results(results_file(tmp_path, pair[one], name))] for one in "ab"
        )
        if pair["metric"] != "nll":
            wins = sum(bool(y.right) and not x.right for x, y in zip(a, b, strict=True))
            losses = sum(bool(x.right) and not y.right for x, y in zip(a, b, strict=True))
            assert (pair["wins"], pair["losses"], pair["rows"]) == (wins, losses, len(a))
        if pair["metric"] in ("exact_match", "choice"):
            assert pair["p"] == pytest.approx(binomial_p(wins, losses))
            assert pair["difference"] == pytest.approx((wins - losses) / len(a))
        elif pair["metric"] == "ranking":
            assert pair["difference"] == pytest.approx(np.mean([y.score - x.score for x, y in zip(a, b, strict=True)]))
        assert pair["low"] <= pair["difference"] <= pair["high"]
    for family in ([p for p in pairs if p["set"] != POOLED], [p for p in pairs if p["set"] == POOLED]):
        ordered = sorted(family, key=lambda pair: pair["p"])
        for place, pair in enumerate(ordered):
            steps = [min(1.0, (len(ordered) - i) * one["p"]) for i, one in enumerate(ordered[: place + 1])]
            assert pair["p_holm"] == pytest.approx(max(steps))


def test_the_markdown_has_tables_tests_and_what_was_left_out(report: Report, tmp_path: Path) -> None:
    text = (tmp_path / "report.md").read_text()
    assert "| m - m/pilot | one | 60 |" in text and f"| m - m/pilot | {POOLED} | 180 |" in text
    assert "one: 60 of 62 test rows (2 bad, see quarantine.jsonl) of rows" in text
    assert str(report.first) in text and "average over sets" in text


# -- verdicts -----------------------------------------------------------------------------------------------------


def pair(metric: Metric, difference: float, p: float, wins: int = 3, losses: int = 1) -> Pair:
    ends = difference - 0.01, difference + 0.01
    return Pair("m/pilot", "m", "test", metric, 40, wins, losses, difference, *ends, p, p)


@pytest.mark.parametrize(
    ("found", "lam", "exported", "said"),
    [
        (
            pair("exact_match", 0.05, 0.6),
            0.5,
            0.5,
            "No gain is shown: +5.0 points (95% interval +4.0 to +6.0, p = 0.6)",
        ),
        (pair("exact_match", 0.05, 0.01), 0.5, 0.5, "The Copilot helps: +5.0 points"),
        (pair("exact_match", -0.05, 0.6, 0, 2), 0.5, 0.0, "with lambda 0.5, it won 0 and lost 2 of 40 test rows"),
        (pair("exact_match", 0.0, 1.0), 0.5, 0.0, "The Copilot does not help: with lambda 0.5"),
        (pair("ranking", 0.2083, 0.01), 0.5, 0.5, "The Copilot helps: NDCG@10 +20.83 points (95% interval +19.83"),
        (pair("ranking", -0.2083, 0.01), 0.5, 0.0, "with lambda 0.5, NDCG@10 -20.83 points"),
        (pair("nll", -0.02, 0.01), 0.5, 0.5, "The Copilot helps: NLL -0.0200 (95% interval -0.0300 to -0.0100"),
        (pair("nll", 0.02, 0.01), 0.5, 0.0, "The Copilot does not help: with lambda 0.5, NLL +0.0200"),
        (pair("exact_match", 0.05, 0.01), 0.0, 0.0, "no lambda beat the Pilot on validation data"),
    ],
)
def test_verdicts(found: Pair, lam: float, exported: float, said: str) -> None:
    rows = RowSet("test", found.metric, [], "rows")
    sample = [RowResult(0, 0, True, 1.0, 0.5, 1, "x", 0.1, 1, {"place": 1.0})]
    line = line_of("m", rows, sample, sample, ("logits", lam), [10])
    verdict = report_of([line], [found], lam).first
    assert said in str(verdict) and verdict.exported_lam == exported
    assert str(verdict) in report_of([line], [found], lam).lines()
    assert "exported" not in str(verdict), "tc-ray eval exports nothing"
    if exported == 0:
        assert "The exported default is lambda 0." in str(report_of([line], [found], lam, exports=True).first)


def test_no_copilot_is_said_with_and_without_an_export() -> None:
    alone = "There is no Copilot: it failed. The Pilot alone was measured"
    assert str(report_of([], [], 0.0, no_copilot="it failed").first) == f"{alone}."
    exported = report_of([], [], 0.0, no_copilot="it failed", exports=True)
    assert str(exported.first) == f"{alone}, and is exported with lambda 0."


def test_several_sets_are_judged_together() -> None:
    single, pooled = (
        pair("exact_match", 0.05, 0.01),
        Pair("m/pilot", "m", POOLED, "exact_match", 80, 2, 9, -0.1, -0.2, 0, 0.06, 1),
    )
    sample = [RowResult(0, 0, True, 1.0, 0.5, 1, "x", 0.1, 1)]
    line = line_of("m", RowSet("test", "exact_match", [], "rows"), sample, sample, ("logits", 0.5), [10])
    assert "it won 2 and lost 9 of 80" in str(report_of([line], [single, pooled], 0.5).first)


def in_nats(tokens: int, *rows: float) -> list[RowResult]:
    """Rows of these nats, each of so many tokens."""
    return [RowResult(n, n, None, -nats / tokens, nats / tokens, tokens, "", 0.1) for n, nats in enumerate(rows)]


def test_nll_is_compared_by_text_where_tokenizers_differ() -> None:
    """Two tokens of a nat each, or four of a half: the same likelihood of the same text."""
    sets = [row_set(held_out(3), "nll")]
    (same,) = pairs_of({"a": {"test": in_nats(2, 2, 4, 6)}, "b": {"test": in_nats(4, 2, 4, 6)}}, sets)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    (worse,) = pairs_of({"a": {"test": in_nats(2, 2, 4, 6)}, "b": {"test": in_nats(4, 3, 5, 7)}}, sets)
    assert worse.difference == pytest.approx(0.5) and not worse.better, "a nat more on two tokens of a"


def test_sets_of_nll_alone_are_judged_together_and_right_answers_before_nll() -> None:
    first, second = row_set(held_out(2), "nll", "x"), row_set(held_out(2), "nll", "y")
    results = {
        "m/pilot": {"x": in_nats(1, 2, 2), "y": in_nats(1, 2, 2)},
        "m": {"x": in_nats(1, 1, 2), "y": in_nats(1, 9, 9)},
    }
    pairs = pairs_of(results, [first, second])
    lines = [
        line_of("m", one, results["m"][one.name], results["m/pilot"][one.name], ("logits", 0.5), [])
        for one in (first, second)
    ]
    verdict = report_of(lines, pairs, 0.5).first
    assert verdict.pair is not None
    assert (verdict.pair.set, verdict.pair.difference) == (POOLED, pytest.approx(13 / 4)) and not verdict.helps
    mixed = [replace(pairs[0], set="x"), pair("exact_match", 0.05, 0.01)]
    assert report_of(lines[:1], mixed, 0.5).first.pair == mixed[1]
