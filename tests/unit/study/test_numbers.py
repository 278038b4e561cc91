"""The report's numbers against a slow, independent computation from made-up cells."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from pathlib import Path

import pytest

from tc_ray.cli.study import study as study_command
from tc_ray.config.yaml_file import ConfigError
from tc_ray.evaluation.statistics import holm, mcnemar_p, mean_interval, sign_flip_p
from tc_ray.study.cells import Cells, Place, cells_of
from tc_ray.study.file import Study
from tc_ray.study.numbers import Numbers
from tc_ray.study.report import Report
from tc_ray.study.results import Answers, Result, find_result
from tests.support.study_samples import answers, made_up, random_results, tiny_study, write_study

ROWS = 12
VARIANTS = {"copilot": {}, "longer": {"control": "longer"}, "both": {"control": "ensemble"}}
T_2 = 4.302653  # two-sided 95% point of Student's t, 2 degrees of freedom


@pytest.fixture
def made(tmp_path: Path) -> tuple[Study, Cells, dict[str, Result]]:
    study = tiny_study(
        tmp_path, seeds=[1, 2, 3], tasks={"sums": {}, "long": {"data.embedded_rows": 130}}, variants=VARIANTS
    )
    cells = cells_of(study)
    return study, cells, random_results(cells, ROWS)


def rights(cells: Cells, results: dict[str, Result], line: str, task: str, seed: int) -> list[int]:
    """Answers of a place, straight from the result."""
    cell, model = cells.shown[Place(line, task, seed)]
    bits = bin(int("1" + results[cell.key].models[model].sets["test"].right, 16))[3:]
    return [int(bit) for bit in bits[:ROWS]]


def brute_force_p(sums: list[int]) -> float:
    """Share of all sign patterns whose sum is as far from 0."""
    moved = [s for s in sums if s]
    observed = abs(sum(sums))
    patterns = list(itertools.product((1, -1), repeat=len(moved)))
    return sum(abs(sum(a * b for a, b in zip(p, moved, strict=True))) >= observed for p in patterns) / len(patterns)


def test_scores_and_tests_are_those_of_a_count_by_hand(made: tuple[Study, Cells, dict[str, Result]]) -> None:
    study, cells, results = made
    numbers = Numbers(study, cells, results)
    raw: dict[tuple[str, str], float] = {}
    for line in cells.lines:
        for task in ("sums", "long"):
            columns = [rights(cells, results, line, task, seed) for seed in (1, 2, 3)]
            means = [sum(column) / ROWS for column in columns]
            centre = sum(means) / 3
            spread = T_2 * math.sqrt(sum((m - centre) ** 2 for m in means) / 2 / 3)
            score = numbers.score(line, task)
            assert score is not None
            assert score.value == pytest.approx(centre)
            ends = (centre - spread, centre + spread) if line != "both" else (-math.inf, math.inf)
            assert score.interval == pytest.approx(ends, abs=1e-4)
            if line != "copilot":
                base = [rights(cells, results, "copilot", task, seed) for seed in (1, 2, 3)]
                sums = [sum(columns[s][i] - base[s][i] for s in range(3)) for i in range(ROWS)]
                raw[line, task] = brute_force_p(sums)
                tested = numbers.tests("copilot")[line, task]
                assert tested.raw_p == pytest.approx(raw[line, task])
                assert tested.difference == pytest.approx(sum(sums) / 3 / ROWS)
                pairs = [(columns[s][i], base[s][i]) for s in range(3) for i in range(ROWS)]
                assert (tested.wins, tested.losses) == (sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    # Holm by its definition: the i-th smallest is multiplied by the number of those not smaller, and never falls
    ordered = sorted(raw, key=lambda key: raw[key])
    largest = 0.0
    for place, key in enumerate(ordered):
        largest = max(largest, min(1.0, raw[key] * (len(ordered) - place)))
        assert numbers.tests("copilot")[key].p == pytest.approx(largest)


def test_the_page_and_the_csv_show_these_numbers(made: tuple[Study, Cells, dict[str, Result]], tmp_path: Path) -> None:
    study, cells, results = made
    report = Report(study, cells, results)
    files = report.save(tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    value = sum(sum(rights(cells, results, "copilot", "sums", seed)) for seed in (1, 2, 3)) / 3 / ROWS
    assert re.search(rf"^\| copilot \| {100 * value:.1f} \(", text, flags=re.MULTILINE)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == len(cells.shown)
    for row in rows:
        right = rights(cells, results, row["line"], row["task"], int(row["seed"]))
        assert float(row["value"]) == pytest.approx(sum(right) / ROWS)
    computes = {row["line"]: float(row["compute"]) for row in rows if row["task"] == "sums"}
    assert computes["copilot/pilot"] == 1.0 and computes["copilot"] == pytest.approx(1.2)
    html = (tmp_path / "results.html").read_text()
    assert "copilot/pilot" in html and "<script" not in html and not re.search(r"(src|href)=.http", html)
    assert {file.suffix for file in files} == {".md", ".html", ".csv", ".svg"}
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / picture).read_text().startswith("<svg")


def test_a_missing_cell_is_named_and_not_guessed(made: tuple[Study, Cells, dict[str, Result]]) -> None:
    study, cells, results = made
    gone = cells.shown[Place("longer", "sums", 2)][0]
    report = Report(study, cells, {key: result for key, result in results.items() if key != gone.key})
    assert ("missing", "sums/longer/2") in report.facts()
    assert ("longer", "sums") not in report.numbers.tests("copilot")
    assert ("longer", "long") in report.numbers.tests("copilot")
    assert report.numbers.average("longer") is None


def test_a_number_from_fewer_seeds_says_so(made: tuple[Study, Cells, dict[str, Result]]) -> None:
    study, cells, results = made
    gone = cells.shown[Place("longer", "sums", 2)][0]
    text = Report(study, cells, {key: result for key, result in results.items() if key != gone.key}).markdown("x")
    row, *_ = re.findall(r"^\| longer \| ([^|]*) \| ([^|]*) \| - \|", text, flags=re.MULTILINE)
    assert row[0].endswith("), 2 of 3 seeds") and "seeds" not in row[1]


def test_ensembles_that_share_pilots_have_no_interval(made: tuple[Study, Cells, dict[str, Result]]) -> None:
    """With two seeds both are the same ensemble; with three the spread shows half of what there is."""
    study, cells, results = made
    numbers = Numbers(study, cells, results)
    endless = (-math.inf, math.inf)
    average = numbers.average("both")
    assert average is not None and average.interval == endless
    assert numbers.tests("copilot")["both", "sums"].interval == endless
    assert numbers.tests("both")["copilot", "sums"].interval == endless
    assert math.isfinite(numbers.tests("copilot")["longer", "sums"].interval[0])
    assert "inf" not in Report(study, cells, results).markdown("x")


def test_tasks_of_unequal_size_weigh_alike_in_test_and_difference(
    made: tuple[Study, Cells, dict[str, Result]],
) -> None:
    """Better on 4 rows of one task, worse on as many of another that has 12: the mean rises, and the test is of that mean."""
    study, cells, results = made
    for (line, task, _), (cell, name) in cells.shown.items():
        size = 4 if task == "sums" else 12
        right = [line == "longer" and task == "sums"] * size
        if task == "long":
            right = [(line != "longer") and at < 4 for at in range(size)]
        results[cell.key].models[name].sets["test"] = answers(right, rows_id=task)
    tested = Numbers(study, cells, results).pooled_tests("copilot")["longer"]
    assert tested.difference == pytest.approx((1 - 1 / 3) / 2)
    assert tested.raw_p == pytest.approx(brute_force_p([9] * 4 + [-3] * 4)) and tested.raw_p < 1


def test_the_page_holds_settings_but_no_secret_and_no_folder(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+1", "completion": "2"}\n')
    variants = {"copilot": {}, "keyed": {"log.storage_options": {"AWS_SECRET_ACCESS_KEY": "open sesame"}}}
    tasks = {"quarter": {"data.train": str(data), "data.max_train_rows": 443}}
    study = tiny_study(tmp_path, recipe=str(tmp_path / "tiny.yaml"), tasks=tasks, variants=variants)
    cells = cells_of(study)
    report = Report(study, cells, random_results(cells, ROWS))
    for text in (report.markdown("x"), report.html()):
        assert "data.train=rows.jsonl, data.max_train_rows=443" in text and "keyed" in text
        assert "sesame" not in text and str(tmp_path) not in text


def test_no_report_is_written_of_no_results(tmp_path: Path) -> None:
    """It would replace the one that is there, say where `results` is misspelt."""
    file = write_study(tmp_path)
    with pytest.raises(ConfigError, match=r"STUDY\.yaml: none of its 2 cells has a result"):
        study_command(file, report=tmp_path / "results.md")
    assert not (tmp_path / "results.md").exists()


def test_lines_that_answered_other_rows_are_not_compared(made: tuple[Study, Cells, dict[str, Result]]) -> None:
    study, cells, results = made
    cell = cells.shown[Place("longer", "sums", 1)][0]
    other = results[cell.key].models["pilot"]
    other.sets["test"] = answers([True] * ROWS, rows_id="others")
    assert ("longer", "sums") not in Numbers(study, cells, results).tests("copilot")


def test_tasks_that_share_their_rows_are_pooled_by_row(made: tuple[Study, Cells, dict[str, Result]]) -> None:
    study, cells, results = made
    sums = [0] * ROWS
    for task in ("sums", "long"):
        for seed in (1, 2, 3):
            mine, base = (rights(cells, results, line, task, seed) for line in ("longer", "copilot"))
            sums = [total + a - b for total, a, b in zip(sums, mine, base, strict=True)]
    tested = Numbers(study, cells, results).pooled_tests("copilot")["longer"]
    assert tested.raw_p == pytest.approx(brute_force_p(sums))
    assert tested.difference == pytest.approx(sum(sums) / 3 / 2 / ROWS)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 1), (3, 3), (40, 12)])
def test_of_one_seed_the_test_is_mcnemars(wins: int, losses: int) -> None:
    assert sign_flip_p([1] * wins + [-1] * losses + [0] * 7) == pytest.approx(mcnemar_p(wins, losses))


@pytest.mark.parametrize("sums", [[3, -1, 2, 0, 1], [2, 2, 2, -3], [1, -1, 3, 3, 3, -2, 1]])
def test_the_test_counts_every_pattern_of_signs(sums: list[int]) -> None:
    assert sign_flip_p(sums) == pytest.approx(brute_force_p(sums))


def test_scores_between_0_and_1_are_tested_by_chance_signs() -> None:
    differences = [0.25, -0.5, 0.75, 0.1, 0.3, 0.2]
    every = [sum(a * b for a, b in zip(p, differences, strict=True)) for p in itertools.product((1, -1), repeat=6)]
    wanted = sum(abs(total) >= sum(differences) - 1e-9 for total in every) / len(every)
    assert sign_flip_p(differences) == pytest.approx(wanted, abs=0.02)


def test_holm_of_a_known_family() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_intervals_of_few_and_many_repetitions() -> None:
    assert mean_interval([0.5]) == (-math.inf, math.inf)
    low, high = mean_interval([1.0, 2.0])
    assert (low, high) == pytest.approx((1.5 - 12.706 * 0.5, 1.5 + 12.706 * 0.5), rel=1e-4)
    values = [float(n % 5) for n in range(31)]  # 30 degrees of freedom: t is 2.0423
    centre = sum(values) / 31
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / 30 / 31)
    assert mean_interval(values)[1] == pytest.approx(centre + 2.0423 * spread, abs=1e-3)


def test_a_result_comes_back_as_it_was_saved(tmp_path: Path, made: tuple[Study, Cells, dict[str, Result]]) -> None:
    *_, results = made
    result = next(iter(results.values()))
    result.save(tmp_path / "first")
    assert find_result(result.key, [tmp_path / "none", tmp_path / "first"]) == result
    right = [True, False, None, True, True, False, True, False, True]
    kept = Answers.of("ranking", "id", 1, right, [0.5] * 9, [0.123456, None] + [1.0] * 7, [3, 0] + [1] * 7)
    assert kept.correct == [bool(one) for one in right] and kept.value == 0.5
    assert kept.mean_nll == pytest.approx((0.1235 * 3 + 7) / 10)


def test_results_are_small(made: tuple[Study, Cells, dict[str, Result]], tmp_path: Path) -> None:
    _, cells, _ = made
    cell = next(iter(cells.by_key.values()))
    from tc_ray.study.results import Model

    big = answers([n % 3 == 0 for n in range(500)], nll=0.12345)
    made_up(cell, {"pilot": Model({"test": big}), "fused": Model({"test": big}, 0.5, "logits")}).save(tmp_path)
    assert (tmp_path / f"{cell.key}.json").stat().st_size < 20_000
