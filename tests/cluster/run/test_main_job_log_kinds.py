"""The main job with the other kinds of log: some layers, a part of the records, dense errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import RoundOrder
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.sampling import in_fraction
from tc_ray.models.fusion import FusedModel
from tc_ray.run.job import JobResult, run_job
from tc_ray.tracking.points import read_points
from tests.support.local_ray import local_ray
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow

ROUNDS = 6

cluster = local_ray(cpus=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    log: dict[str, Any] = {
        "log__top_k": 5,
        "log__rationale": [0, 2],
        "log__pooling": "max",
        "log__sampling": "fraction",
        "log__sampling_fraction": 0.5,
    }
    return tiny_config(tmp_path_factory.mktemp("job"), resources__pilot_workers=2, pilot__max_rounds=ROUNDS, **log)


def points(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [p for p in read_points(config.run.path / "metrics.jsonl") if p["kind"] == kind]


def test_the_fraction_is_in_the_log_and_the_rest_is_counted(config: RunConfig, result: JobResult) -> None:
    train = json.loads((config.run.path / "data" / "data.json").read_text())["rows"]["train"]
    order = RoundOrder(train, config.pilot.batch_size, config.pilot.epochs, config.run.seed)
    trained = [(number, int(row)) for number in range(1, ROUNDS + 1) for row in order.sample_rows(number)]
    chosen = in_fraction(0.5, config.run.seed, *(np.array(column) for column in zip(*trained, strict=True)))
    wanted = sorted(key for key, kept in zip(trained, chosen, strict=True) if kept)
    rows = MistakeLog(config.run.path / "log").arrow(columns=["round", "sample_id"])
    assert sorted(zip(rows["round"].to_pylist(), rows["sample_id"].to_pylist(), strict=True)) == wanted
    assert points(config, "pilot")[-1]["metrics"]["log_skipped_records"] == len(trained) - len(wanted) > 0


def test_both_workers_keep_the_same_k(config: RunConfig, result: JobResult) -> None:
    records = MistakeLog(config.run.path / "log").records()
    assert records.top_k == 5 and set(records.rank.tolist()) == {0, 1}
    # an acknowledgement comes after the file of its rounds: the last report counts at least the first file
    assert points(config, "pilot")[-1]["metrics"]["log_bytes_per_token"] > 2 * 2 * 32 / 2


def test_the_copilot_reads_the_layers_pooled(config: RunConfig, result: JobResult) -> None:
    log = MistakeLog(config.run.path / "log")
    assert (log.metadata.pooling, log.metadata.rationale_layers, log.metadata.layers) == ("none", 2, "0,2")
    assert log.records().rationale.shape[1:] == (2, 32)
    assert result.export is not None
    fused = FusedModel.from_pretrained(result.export)
    assert (fused.copilot.config.tap_layers, fused.copilot.config.pooling) == ([0, 2], "max")
    losses = [p["metrics"]["loss"] for p in points(config, "copilot")]
    assert len(losses) == 2 * ROUNDS and losses[-1] < losses[0]
    made = fused.generate(torch.tensor([[5, 9, 30]]), max_new_tokens=4, do_sample=False, lam=0.5)
    assert made.shape[0] == 1


def test_dense_errors_of_all_layers(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, pilot__max_rounds=ROUNDS, log__error="dense", log__rationale="all", log__sampling="mistakes"
    )
    result = run_job(config)
    assert result.report is not None
    records = MistakeLog(config.run.path / "log").records()
    records.validate()
    assert (records.error, records.top_k, records.rationale_layers) == ("dense", 257, 4)
    np.testing.assert_allclose(records.error_values.sum(1), 0.0, atol=1e-5)
