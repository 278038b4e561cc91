"""The main job on item sequences: a T5 made from its config, Copilot, items ranked by beam search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.data.source.records import DataError
from tc_ray.run.evaluate import evaluate_run
from tc_ray.run.job import JobResult
from tests.support.local_ray import local_ray
from tests.support.tiny_run import tiny_config

ITEMS_MODEL = Path(__file__).resolve().parents[3] / "tc_ray" / "recipes" / "models" / "t5-items"

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
        fusion__metric="ranking",
        fusion__space="choose",
        fusion__ranking={"cutoffs": [5, 10, 20]},
        fusion__max_test_rows=20,
    )


def test_the_report_has_every_measure_for_both_models(config: RunConfig, result: JobResult) -> None:
    saved = json.loads((config.run.path / "evaluation.json").read_text())
    names = [f"{name}_at_{k}" for name in ("hit", "ndcg") for k in (5, 10, 20)]
    assert list(saved["measures"]) == names
    assert saved["comparison"]["rows"] == 20
    for name, measure in saved["measures"].items():
        for model in ("pilot", "fused"):
            low, high = measure[f"{model}_interval"]
            assert 0 <= low <= measure[model] <= high <= 1, name
    assert len(saved["validation"]) == 3, "lambda 0, and 0.5 in both spaces"
    assert saved["pilot_forced"]["tokens"] == 20 * 3, "two tokens an item, and the end token"
    assert result.report.verdict in (config.run.path / "evaluation.md").read_text()
    status = json.loads((config.run.path / "status.json").read_text())
    assert status["evaluation"]["score_name"] == "NDCG@10"


def test_a_run_is_measured_on_its_own_users_only(config: RunConfig, result: JobResult, tmp_path: Path) -> None:
    other = tmp_path / "others.txt"
    other.write_text("new 1 2 3 4\n")
    with pytest.raises(DataError, match="measured on its own users only"):
        evaluate_run(config.run.path, other)
