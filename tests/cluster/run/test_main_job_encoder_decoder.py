"""The main job with an encoder-decoder on item sequences: a T5 made from its config, a log with the encoder's output, items
ranked by beam search, a sequence-to-sequence export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from tc_ray.config.schema import RunConfig
from tc_ray.data.source.records import DataError
from tc_ray.evaluation.rows import read_results, read_sets, results_file
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tc_ray.run.evaluate import Asked, evaluate_models
from tc_ray.run.job import JobError, JobResult, run_job
from tests.support.local_ray import local_ray
from tests.support.tiny_run import assert_log_is_exact, tiny_config

ITEMS_MODEL = Path(__file__).resolve().parents[3] / "tc_ray" / "recipes" / "models" / "t5-items"
ROUNDS = 10

cluster = local_ray(cpus=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(
        tmp_path_factory.mktemp("job"),
        model__pilot=str(ITEMS_MODEL),
        model__random_weights=True,
        data__format="sequences",
        data__plain_template="{prompt}",
        data__sequences={"users": 30, "items": 150, "clusters": 5, "history": 6},
        log__positions="target",
        log__top_k=8,
        fusion__metric="ranking",
        fusion__space="choose",
        fusion__ranking={"cutoffs": [5, 10, 20]},
        fusion__max_test_rows=20,
        resources__pilot_workers=2,
    )


def test_the_log_holds_the_encoder_s_output(config: RunConfig, result: JobResult) -> None:
    train = json.loads((config.run.path / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, train)
    log = MistakeLog(config.run.path / "log")
    assert (log.metadata.question, log.metadata.positions) == ("states", "target")
    records = log.records(rounds=(1, 1))
    records.validate()
    assert records.question is not None and len(records.question) == records.target_start.sum()
    # the states of a round are those of the weights it began with: round 1 has those that the workers made
    torch.manual_seed(config.run.seed)
    pilot = load_pilot(ITEMS_MODEL, dtype=torch.float32, random_weights=True).eval()
    row = records.select([0])
    with torch.no_grad():
        plain = pilot.get_encoder()(torch.from_numpy(row.input_ids[None, : row.target_start[0]]).long())[0]
    stored = torch.from_numpy(row.question.view(np.int16)).view(torch.bfloat16).float()
    # training runs with dropout 0.1, so they agree in direction, not in digits
    cosine = torch.nn.functional.cosine_similarity(stored, plain[0])
    assert float(cosine.mean()) > 0.8
    assert np.isfinite(records.token_loss).all()


def test_the_export_decodes(config: RunConfig, result: JobResult) -> None:
    assert result.export is not None and result.report is not None
    fused = FusedModel.from_pretrained(result.export)
    assert fused.config.is_encoder_decoder
    tokenizer = AutoTokenizer.from_pretrained(result.export / "pilot")
    (example,) = read_sets(config.run.path / "data" / "test.parquet", 1)["test"]
    assert example.prompt_ids[-1] == tokenizer.eos_token_id
    ids = torch.tensor([example.prompt_ids])
    made = fused.generate(ids, max_new_tokens=5, do_sample=False, lam=0.5, num_beams=3)
    assert made[0, 0] == fused.config.decoder_start_token_id and made.shape[1] <= 6
    with torch.no_grad():  # attention has another kernel where gradients are kept
        out = fused.pilot(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits
    assert torch.equal(fused(ids, lam=0.0).logits, out)
    plain = T5ForConditionalGeneration.from_pretrained(result.export / "pilot")
    for (name, one), other in zip(plain.named_parameters(), fused.pilot.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_report_has_every_measure_for_both_models(config: RunConfig, result: JobResult) -> None:
    saved = json.loads((config.run.path / "evaluation" / "report.json").read_text())
    names = [f"{name}@{k}" for name in ("Hit", "NDCG") for k in (5, 10, 20)]
    assert list(saved["results"]) == ["run/pilot", "run"]
    for by_set in saved["results"].values():
        line = by_set["test"]
        assert (list(line["measures"]), line["rows"], line["metric"]) == (names, 20, "ranking")
        for name, measure in line["measures"].items():
            assert 0 <= measure["low"] <= measure["value"] <= measure["high"] <= 1, name
        assert line["value"] == line["measures"]["NDCG@10"]["value"]
    assert len(saved["sources"]["run"]["grid"]) == 3, "lambda 0, and 0.5 in both spaces"
    rows = read_results(results_file(config.run.path / "evaluation", "run/pilot", "test"))
    assert sum(row.tokens for row in rows) == 20 * 3, "two tokens an item, and the end token"
    assert str(result.report.first) in (config.run.path / "evaluation" / "report.md").read_text()
    status = json.loads((config.run.path / "status.json").read_text())
    assert status["evaluation"]["results"]["run"]["test"]["metric"] == "ranking"


def test_a_run_is_measured_on_its_own_users_only(config: RunConfig, result: JobResult, tmp_path: Path) -> None:
    other = tmp_path / "others.txt"
    other.write_text("new 1 2 3 4\n")
    with pytest.raises(DataError, match="measured on its own users only"):
        evaluate_models([str(config.run.path)], Asked({"others": str(other)}))


def test_states_of_every_position_are_refused(config: RunConfig, tmp_path: Path) -> None:
    run, log = (
        section.model_copy(update=changed)
        for section, changed in ((config.run, {"folder": tmp_path / "run"}), (config.log, {"positions": "all"}))
    )
    with pytest.raises(JobError, match=r"set log\.positions=target"):
        run_job(config.model_copy(update={"run": run, "log": log}))
