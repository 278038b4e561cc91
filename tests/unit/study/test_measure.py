"""What a correction moves on gold tokens against the slow reference, and an evaluation's files as results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tc_ray.data.prepared.folder import LeftOut
from tc_ray.evaluation.rows import HeldOut, RowResult, RowSet, results_file, write_results
from tc_ray.evaluation.scores import NLL
from tc_ray.evaluation.teacher_forced import Text, text_measures
from tc_ray.models.copilot import Copilot
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tc_ray.study.gold import FIRST, MOVED, SQUARED_ERROR, gold_sums, gold_tokens
from tc_ray.study.measure import fused_by, read_models
from tests.support.reference import copilot_f, dense_record, fused_logits
from tests.support.tiny_model import make_tiny_llama

ROWS = 5


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", scale=4.0)
    pilot = load_pilot(folder, dtype=torch.float32)
    torch.manual_seed(6)
    copilot = Copilot.from_decoder(folder, [0, 1], pilot=pilot)
    with torch.no_grad():
        copilot.output.weight.normal_(std=0.4)
    return FusedModel.join(pilot, copilot.eval())


def texts() -> list[Text]:
    draw = np.random.default_rng(2)
    lengths = draw.integers(6, 14, ROWS).tolist()
    return [*(Text(draw.integers(2, 258, n).tolist(), int(draw.integers(2, n - 1))) for n in lengths), Text([5, 6], 2)]


@torch.no_grad()
def slow_moved(fused: FusedModel, text: Text, space: str, lam: float) -> float:
    """Token by token, over the whole vocabulary."""
    dense = dense_record(fused.pilot, text.ids, text.start)
    last = len(text.ids) - 1
    states = dense.states[:last].bfloat16().float()
    places = (list(range(last)), list(range(text.start - 1, last)))
    f = copilot_f(fused.copilot, text.ids[: text.start], states, *places, dense.errors)
    found = 0.0
    for i in range(len(text.ids) - text.start):
        p, q = dense.logits[i].softmax(-1), fused_logits(dense.logits[i], f[i], lam, space).softmax(-1)
        found += float((q - p).abs().sum() / 2)
    return found


@pytest.mark.parametrize(("space", "lam"), [("probability", 0.6), ("logits", 1.5)])
def test_sums_over_gold_tokens(fused: FusedModel, space: str, lam: float) -> None:
    pieces = gold_tokens(fused.pilot, texts(), copilot=fused.copilot)
    found = gold_sums(pieces, len(texts()), fused_by(space, lam))
    # 1e-3: a state on the middle between two bfloat16 numbers may be rounded either way
    wanted = [slow_moved(fused, text, space, lam) for text in texts()[:-1]] + [0.0]
    assert found[:, MOVED].tolist() == pytest.approx(wanted, rel=1e-3)
    assert min(wanted[:-1]) > 0.05, "the Copilot changed nothing"
    # the other columns are those of the evaluation, which has a reference of its own
    same = text_measures(fused, texts(), [(space, lam)], batch_size=2)[:, 0]
    for column in (SQUARED_ERROR, NLL, FIRST):
        assert found[:, column].tolist() == pytest.approx(same[:, column].tolist(), rel=1e-3)


def test_an_evaluation_becomes_models(tmp_path: Path) -> None:
    held = [HeldOut(i, [1, 2, 3], 2, str(i), f"prompt {i}") for i in range(3)]
    rows = RowSet("test", "exact_match", held, "here", LeftOut(prompt_too_long=2))
    for model, right in (("cell", [True, False, True]), ("cell/pilot", [False, False, True])):
        results = [RowResult(i, i, r, float(r), 0.25 * (i + 1), 1, "x") for i, r in enumerate(right)]
        write_results(results_file(tmp_path, model, "test"), results)
    head = "model,set,metric,rows,left_out,value,low,high,nll,error_ratio,token_accuracy,lam,space"
    lines = [
        head,
        "cell/pilot,test,exact_match,3,2,0,0,1,,1,,0,logits",
        "cell,test,exact_match,3,2,0,0,1,,0.9,,0.5,logits",
    ]
    (tmp_path / "report.csv").write_text("\n".join(lines) + "\n")
    models = read_models(tmp_path, "test", rows)
    assert models["fused"].sets["test"].correct == [True, False, True]
    assert (models["fused"].lam, models["fused"].space, models["fused"].error_ratio) == (0.5, "logits", 0.9)
    pilot = models["pilot"]
    assert pilot.lam is None and pilot.sets["test"].correct == [False, False, True]
    assert pilot.sets["test"].nll == [0.25, 0.5, 0.75] and pilot.sets["test"].left_out == 2
    assert pilot.sets["test"].rows_id == models["fused"].sets["test"].rows_id
    # a Pilot that has no Copilot is one line under the plain name
    (tmp_path / "report.csv").write_text("\n".join([head, lines[1].replace("cell/pilot", "cell")]) + "\n")
    assert read_models(tmp_path, "test", rows).keys() == {"pilot"}
