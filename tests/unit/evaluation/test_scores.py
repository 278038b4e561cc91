"""Each metric on rows whose numbers are known, or computed a second time by hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tc_ray.data.encode.tokenize import completion_ids
from tc_ray.evaluation.passes import Pass
from tc_ray.evaluation.rows import HeldOut, RowResult, read_results, write_results
from tc_ray.evaluation.scores import (
    NoGoldError,
    check_gold,
    gold_option,
    hit_at,
    ndcg_at,
    ranking_measures,
    result,
)
from tc_ray.files import DamagedFileError
from tests.support.evaluation_samples import HerePool, row_set, source, tiny_fused
from tests.support.tiny_model import make_tokenizer


def row(**fields: Any) -> HeldOut:
    return HeldOut(
        **{"sample_id": 4, "input_ids": [5, 6, 7, 8], "target_start": 2, "answer": "7", "prompt": "p"} | fields
    )


FORCED = [2, [[0.5, 3.0, 1.0], [0.25, 1.0, 2.0]]]
"""Two gold tokens, two choices: squared error, nats, tokens ranked first."""


def test_exact_match_compares_final_answers() -> None:
    found = result(0, row_set([row()]), FORCED, 0, "so x = 3 + 4\nThe answer is 7")
    assert found == RowResult(0, 4, True, 1.0, 1.5, 2, "so x = 3 + 4\nThe answer is 7", 0.5, 1)
    assert result(0, row_set([row()]), FORCED, 1, "8") == RowResult(0, 4, False, 0.0, 0.5, 2, "8", 0.25, 2)
    bare = result(0, row_set([row(input_ids=[5, 6])]), [0, [[0.0, 0.0, 0.0]] * 2], 0, "7")
    assert (bare.right, bare.nll, bare.tokens, bare.squared_error) == (True, None, 0, None)


def test_nll_knows_no_right_and_wrong() -> None:
    found = result(0, row_set([row()], "nll"), FORCED, 1, None)
    assert (found.right, found.score, found.nll, found.tokens, found.said) == (None, -0.5, 0.5, 2, "")


def slow_chrf(said: str, gold: str) -> float:
    """Popovic 2015 by its definition: precision and recall of character n-grams, averaged over n, recall counted twice."""
    precisions, recalls = [], []
    for n in range(1, 7):
        mine, wanted = (
            Counter(text[at : at + n] for at in range(len(text) - n + 1))
            for text in ("".join(said.split()), "".join(gold.split()))
        )
        if mine and wanted:
            common = (mine & wanted).total()
            precisions.append(common / mine.total())
            recalls.append(common / wanted.total())
    if not sum(precisions):
        return 0.0
    precision, recall = (sum(found) / len(found) for found in (precisions, recalls))
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_chrf_is_that_of_its_definition_against_the_completion_else_the_answer() -> None:
    gold = "The cat sat on the mat."
    texts = (gold, "A cat is on a mat", "the  cat sat", "Katze", "", "猫 on the mat, 猫")
    for said in texts:
        found = result(0, row_set([row(completion=gold)], "chrf"), FORCED, 1, said)
        assert (found.right, found.said, found.nll) == (None, said, 0.5)
        assert found.score == pytest.approx(slow_chrf(said, gold))
    assert result(0, row_set([row(completion=gold)], "chrf"), FORCED, 1, gold).score == 100
    bare = row_set([row(answer="on the mat")], "chrf")
    assert result(0, bare, FORCED, 1, "the mat").score == pytest.approx(slow_chrf("the mat", "on the mat"))
    with pytest.raises(NoGoldError, match="row 1: metric chrf: it has neither completion nor answer"):
        check_gold(row_set([row(), row(answer=" ")], "chrf"))


def test_options_are_ranked_by_sum_token_and_character() -> None:
    """Three options; each rule prefers another one."""
    options = ("aa", "bbbb", "c" * 40)
    one = row(options=options, answer="bbbb")
    nats = [2.0, 3.0, 7.0]
    found = [[tokens, [[0.1, nat, 1.0]]] for tokens, nat in zip([1, 3, 3], nats, strict=True)]
    assert [nat / tokens for nat, tokens in zip(nats, [1, 3, 3], strict=True)] == pytest.approx([2.0, 1.0, 7 / 3])
    for by, said, right in (("sum", "aa", False), ("token", "bbbb", True), ("character", "c" * 40, False)):
        scored = result(0, row_set([one], "choice", option_by=by), found, 0, None)
        assert (scored.said, scored.right, scored.score) == (said, right, float(right))
        assert scored.measures == {"accuracy by sum": 0.0, "accuracy by token": 1.0, "accuracy by character": 0.0}
        # teacher-forced numbers are those of the right option
        assert (scored.tokens, scored.nll) == (3, 1.0)


def test_options_are_scored_as_the_model_s_own_log_probabilities(tmp_path: Path) -> None:
    """Against transformers' logits, an option at a time; the end token counts."""
    fused, tokenizer = tiny_fused(tmp_path), make_tokenizer()
    prompt = tokenizer("Is water wet? ")["input_ids"]
    rows = row_set(
        [row(input_ids=prompt, target_start=len(prompt), answer="yes", options=("yes", "no", "a bit"))], "choice"
    )
    pool = HerePool(m=(fused.pilot.eval(), tokenizer))
    job = Pass("options", source(fused=False), rows, (("probability", 0.0),), "own", 8)
    (found,) = pool.at(tmp_path).run(job)
    for option, (tokens, ((_, nats, _),)) in zip(rows.rows[0].options, found, strict=True):
        ids = completion_ids(option, tokenizer)
        assert tokens == len(ids) == len(option) + 1
        with torch.no_grad():
            logits = fused.pilot(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert nats == pytest.approx(-float(logits.gather(1, torch.tensor(ids)[:, None]).sum()), rel=1e-4)
    likeliest = min(range(3), key=lambda i: found[i][1][0][1])
    assert result(0, rows, found, 0, None).said == rows.rows[0].options[likeliest]


def test_the_right_option() -> None:
    options = ("the correct answer is answer1", "the correct answer is answer2")
    assert gold_option(row(options=options, answer="answer2")) == 1
    assert gold_option(row(options=options, answer="x", completion=options[0])) == 0
    assert gold_option(row(options=("yes", "no"), answer="no")) == 1
    assert gold_option(row(options=options, answer="answer3")) is None
    assert gold_option(row(answer="answer3")) is None


def test_rows_that_cannot_be_measured_are_named() -> None:
    with pytest.raises(NoGoldError, match=r"test \(made up\), row 1: metric choice: it has no `options`; .*--task"):
        check_gold(row_set([row(options=("7", "8")), row()], "choice"))
    with pytest.raises(NoGoldError, match=r"row 0: metric choice: `answer` is none of its `options`"):
        check_gold(row_set([row(options=("9", "8"))], "choice"))
    with pytest.raises(NoGoldError, match=r"row 0: metric nll: it has no completion"):
        check_gold(row_set([row(input_ids=[1, 2])], "nll"))
    with pytest.raises(NoGoldError, match=r"row 0: metric ranking: `answer` is no item; only a run of item sequences"):
        check_gold(row_set([row()], "ranking"), ["6", "8"])
    check_gold(row_set([row(input_ids=[1, 2])]))


def test_ranking_measures_by_hand() -> None:
    # place:        1    2           3     not among the first k or not ranked
    assert [hit_at(5, place) for place in (1, 2, 5, 6, None)] == [1, 1, 1, 0, 0]
    assert [ndcg_at(5, place) for place in (1, 3, 6, None)] == [1.0, 0.5, 0.0, 0.0]
    assert ndcg_at(10, 7) == pytest.approx(1 / 3)
    assert ndcg_at(10, 2) == pytest.approx(0.6309297535714575)  # 1 / log2(3)
    rows = row_set([row(), row()], "ranking")
    results = [result(i, rows, FORCED, 0, said) for i, said in enumerate(([3, "12 7"], [None, "12"]))]
    assert [(one.right, one.score, one.said) for one in results] == [(True, 0.5, "12 7"), (False, 0.0, "12")]
    assert ranking_measures(results, [2, 10]) == {
        "Hit@2": [0.0, 0.0],
        "Hit@10": [1.0, 0.0],
        "NDCG@2": [0.0, 0.0],
        "NDCG@10": [0.5, 0.0],
    }


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [
        RowResult(0, 4, True, 1.0, 1.5, 2, "a\u2028b \u00e9", 0.5, 1, {"place": 3.0}),
        RowResult(1, 9, None, -0.25, None, 0, ""),
    ]
    write_results(tmp_path / "rows" / "m" / "test.jsonl", results)
    found = read_results(tmp_path / "rows" / "m" / "test.jsonl")
    assert found == results
    (tmp_path / "rows" / "m" / "test.jsonl").write_text('{"row": 1}\n')
    with pytest.raises(DamagedFileError, match=r"test\.jsonl"):
        read_results(tmp_path / "rows" / "m" / "test.jsonl")


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    write_results(tmp_path / "x.jsonl", [RowResult(0, 0, None, 0.0, math.nan, 1, "")])
    assert read_results(tmp_path / "x.jsonl")[0].nll is None
