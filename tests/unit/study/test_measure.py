"""What is measured on gold tokens against the slow reference, and a run folder's files as results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.folder import SCHEMA
from tc_ray.evaluation import procedure
from tc_ray.evaluation.decode import HeldOut, complete
from tc_ray.evaluation.scoring import matches
from tc_ray.models.copilot import Copilot
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tc_ray.study.gold import GoldMeasures, gold_measures, gold_tokens
from tc_ray.study.measure import fused_by, measure
from tests.support.reference import copilot_f, dense_record, fused_logits
from tests.support.study_samples import read_rows
from tests.support.tiny_model import make_tiny_llama, make_tokenizer

ROWS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with models that nobody trained."""
    run = tmp_path_factory.mktemp("run")
    make_tiny_llama(run / "pilot" / "final", scale=4.0)
    pilot = load_pilot(run / "pilot" / "final", dtype=torch.float32)
    torch.manual_seed(6)
    copilot = Copilot.from_decoder(run / "pilot" / "final", [0, 1], pilot=pilot)
    with torch.no_grad():
        copilot.output.weight.normal_(std=0.4)
    copilot.save_pretrained(run / "copilot" / "final")
    (run / "data").mkdir()
    for part, seed in (("validation", 1), ("test", 2)):
        rows = [
            {"sample_id": e.sample_id, "input_ids": e.input_ids, "target_start": e.target_start}
            | {"prompt": e.prompt, "completion": None, "answer": e.answer}
            for e in examples(seed)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), run / "data" / f"{part}.parquet")
    return run


def examples(seed: int) -> list[HeldOut]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(6, 14, ROWS).tolist()
    return [
        HeldOut(i, draw.integers(2, 258, n).tolist(), int(draw.integers(2, n - 1)), str(i), f"prompt {i}")
        for i, n in enumerate(lengths)
    ]


def config(folder: Path, **fusion: object) -> RunConfig:
    sections = {"run": {"name": "cell", "folder": folder}, "pilot": {"dtype": "fp32"}, "copilot": {"dtype": "fp32"}}
    return RunConfig.model_validate(sections | {"fusion": {"max_new_tokens": 3, "eval_batch_size": 2, **fusion}})


def slow(fused: FusedModel, rows: list[HeldOut], space: str, lam: float) -> GoldMeasures:
    """Token by token, over the whole vocabulary."""
    nll, tokens, moved = [], [], []
    error = base = 0.0
    for e in rows:
        dense = dense_record(fused.pilot, e.input_ids, e.target_start)
        last = len(e.input_ids) - 1
        states = dense.states[:last].bfloat16().float()
        with torch.no_grad():
            places = (list(range(last)), list(range(e.target_start - 1, last)))
            f = copilot_f(fused.copilot, e.input_ids[: e.target_start], states, *places, dense.errors)
        row = []
        for i, token in enumerate(e.input_ids[e.target_start :]):
            p, q = dense.logits[i].softmax(-1), fused_logits(dense.logits[i], f[i], lam, space).softmax(-1)
            truth = torch.nn.functional.one_hot(torch.tensor(token), len(p))
            row.append(-float(q[token].clamp_min(1e-8).log()))
            moved.append(float((q - p).abs().sum() / 2))
            base, error = base + float(((truth - p) ** 2).sum()), error + float(((truth - q) ** 2).sum())
        nll.append(sum(row) / len(row))
        tokens.append(len(row))
    return GoldMeasures(nll, tokens, error / base, sum(moved) / len(moved))


@pytest.mark.parametrize(("space", "lam"), [("probability", 0.6), ("logits", 1.5)])
def test_gold_measures_are_the_references(folder: Path, space: str, lam: float) -> None:
    pilot = load_pilot(folder / "pilot" / "final", dtype=torch.float32)
    copilot = Copilot.from_pretrained(folder / "copilot" / "final", dtype=torch.float32).eval()
    rows = examples(2)
    found = gold_measures(gold_tokens(pilot, rows, batch_size=2, copilot=copilot), ROWS, fused_by(space, lam))
    wanted = slow(FusedModel.join(pilot, copilot), rows, space, lam)
    assert found.tokens == wanted.tokens
    # 1e-3: a state on the middle between two bfloat16 numbers may be rounded either way
    assert found.nll == pytest.approx(wanted.nll, rel=1e-3)
    assert (found.error_ratio, found.correction) == pytest.approx((wanted.error_ratio, wanted.correction), rel=1e-3)
    assert wanted.correction is not None and wanted.correction > 0.05, "the Copilot changed nothing"


def test_a_run_folder_becomes_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedure, "choose", lambda scores, nll: ("logits", 0.5))
    models = measure(config(folder, space="choose", lam_grid=[0.0, 0.5]), "test")
    assert models.keys() == {"pilot", "fused"}
    assert (models["fused"].lam, models["fused"].space) == (0.5, "logits")
    pilot = load_pilot(folder / "pilot" / "final", dtype=torch.float32)
    copilot = Copilot.from_pretrained(folder / "copilot" / "final", dtype=torch.float32)
    fused, tokenizer, rows = FusedModel.join(pilot, copilot, space="logits"), make_tokenizer(), examples(2)
    texts = complete(fused, tokenizer, rows, max_new_tokens=3, batch_size=1, lam=0.5)
    kept = read_rows(folder / "evaluation" / "rows" / "cell" / "test.jsonl")
    assert [row["said"] for row in kept] == texts
    answers = models["fused"].sets["test"]
    assert answers.correct == [matches(text, row.answer) for text, row in zip(texts, rows, strict=True)]
    wanted = slow(fused, rows, "logits", 0.5)
    assert answers.nll == pytest.approx(wanted.nll, rel=1e-3)
    assert models["fused"].correction == pytest.approx(wanted.correction, rel=1e-3)
    assert models["fused"].error_ratio == pytest.approx(wanted.error_ratio, rel=1e-3)
    alone = read_rows(folder / "evaluation" / "rows" / "cell--pilot" / "test.jsonl")
    assert [row["said"] for row in alone] == complete(pilot, tokenizer, rows, max_new_tokens=3, batch_size=1)
    assert models["pilot"].sets["test"].nll == pytest.approx(slow(fused, rows, "logits", 0.0).nll, rel=1e-3)


def test_other_rows_have_another_identity(folder: Path) -> None:
    whole = measure(config(folder), "test")["pilot"].sets["test"]
    less = measure(config(folder, max_test_rows=3), "test")["pilot"].sets["test"]
    assert less.rows_id != whole.rows_id and less.rows == 3 and less.left_out == 2
