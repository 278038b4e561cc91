"""A run that its validations end early, with functions named by the config: the whole job agrees on the last round.

The validation rows say letters where the training rows say sums, so that their NLL soon rises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.checkpoint import latest
from tc_ray.run.costs.measured import read_costs
from tc_ray.run.job import JobResult, run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import line, read_status
from tests.support.command_line import tc_ray
from tests.support.tiny_run import assert_log_is_exact, tiny_config

pytestmark = pytest.mark.slow

PLANNED = 40
MODULE = """
import json
from pathlib import Path

def length(said, row):
    return float(len(said))

def convert(record):
    return record | {"prompt": "sum: " + record["prompt"]}

def on_round(number, metrics):
    with Path(__file__).with_name("rounds.jsonl").open("a") as file:
        file.write(json.dumps([number, metrics["loss"]]) + chr(10))

def on_evaluation(report, folder):
    raise ValueError("no mail server")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of the driver, before Ray is started in it."""
    made = tmp_path_factory.mktemp("early")
    (made / "job_functions.py").write_text(MODULE)
    letters = [{"prompt": f"{n} + 1", "completion": "qz" * 12} for n in range(8)]
    (made / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letters))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made


@pytest.fixture(scope="module", autouse=True)
def cluster(folder: Path) -> Iterator[None]:
    """A Ray that is started there, as the command starts or joins one."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return tiny_config(
        folder,
        pilot__max_rounds=PLANNED,
        pilot__learning_rate=0.03,
        pilot__lr_schedule="constant",
        data__validation=str(folder / "letters.jsonl"),
        pilot__validate_every=2,
        pilot__patience=2,
        pilot__final="best",
        data__convert="job_functions:convert",
        fusion__metric="job_functions:length",
        callbacks__on_round="job_functions:on_round",
        callbacks__on_evaluation="job_functions:on_evaluation",
    )


def test_all_parts_end_with_the_same_round(config: RunConfig, result: JobResult, folder: Path) -> None:
    run = config.run.path
    found = [point for point in read_points(run / "metrics.jsonl") if point["kind"] == "validation"]
    last, best = found[-1]["round"], int(found[-1]["metrics"]["best_round"])
    assert last < PLANNED and found[-1]["metrics"]["ended"] == 1 and last == best + 4
    train = json.loads((run / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, last, train)
    numbers = [json.loads(text)[0] for text in (folder / "rounds.jsonl").read_text().splitlines()]
    assert numbers == list(range(1, last + 1))
    at = latest(run / "copilot" / "checkpoints")
    assert at is not None and at.step == last * config.copilot.steps_per_round
    status = read_status(run)
    assert status["plan"] == {"rounds_total": last, "copilot_steps_total": at.step}
    assert f"round {last}/{last}" in line(status) and f"lowest {found[-1]['metrics']['lowest']:.4f} at {best}" in line(
        status
    )
    kinds = {event["kind"]: event["text"] for event in status["events"]}
    assert kinds["callback"].endswith("on_evaluation job_functions:on_evaluation failed: ValueError: no mail server")
    assert "early end" in kinds
    provenance = json.loads((run / "export" / "provenance.json").read_text())
    assert (provenance["rounds"], provenance["pilot_round"]) == (last, best)
    assert {one.metric for one in result.report.measured} == {"job_functions:length"}
    assert pq.read_table(run / "data" / "train.parquet")["prompt"][0].as_py().startswith("sum: ")


def test_the_run_says_what_it_took(config: RunConfig, result: JobResult) -> None:
    """By the real Tracker: each part and each process. Data tasks alone say nothing of their memory."""
    costs = read_costs(config.run.path)
    assert costs.starts == 1 and costs.copilot.count == costs.pilot.count * config.copilot.steps_per_round
    assert sum(costs.parts.values()) == pytest.approx(costs.seconds)
    named = ("data", "Pilot: loading", "Pilot: rounds", "Pilot: validation", "Pilot: checkpoints", "Pilot: export")
    for part in (*named, "evaluation", "export"):
        assert costs.parts[part] > 0, part
    assert costs.parts["rest"] < 0.3 * costs.seconds, costs.parts
    assert {"driver", "ledger", "tracker", "pilot-0", "copilot-0", "evaluation-0"} <= set(costs.memory)
    assert all(1e7 < size < 1e11 for size in costs.memory.values())
    assert 0 < costs.produced < 1e3 and 0 < costs.consumable < 1e3
    assert costs.lag.y[-1] == 0 and costs.log is not None and costs.log.rounds == costs.pilot.count
    assert "rounds/s consumable" in tc_ray("report", config.run.path).stdout


def test_the_same_command_skips_what_is_done(config: RunConfig, result: JobResult) -> None:
    weights = config.run.path / "pilot" / "final" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run_job(config)
    assert weights.stat().st_mtime_ns == before
    assert again.report.to_dict()["results"] == result.report.to_dict()["results"]
    assert json.loads((again.folder / "export" / "provenance.json").read_text())["rounds"] < PLANNED
