"""A whole study in miniature: every control, what its cells share, what they leave, and that it is not done twice."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from tc_ray.evaluation.answers.scoring import matches
from tc_ray.evaluation.rows import read_sets
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.study.cells import Cells, Place, cells_of
from tc_ray.study.file import Study, load_study
from tc_ray.study.results import Result
from tc_ray.study.schedule import folder_of, left_to_run, results_of, run_study
from tests.support.command_line import tc_ray
from tests.support.local_ray import local_ray
from tests.support.study_samples import write_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # nine cells, one after the other
cluster = local_ray(cpus=2)

VARIANTS = {
    "copilot": {},
    "late": {"copilot.pattern": "late"},
    "logits": {"fusion.space": "logits"},
    **{name: {"control": name} for name in ("longer", "wider", "ensemble", "temperature", "latest")},
    "transfer": {"control": "transfer", "pilot.learning_rate": 0.01},
}
TASKS = {"sums": {"pilot.method": "lora", "pilot.lora.rank": 2, "tracking.enabled": True}}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), tasks=TASKS, variants=VARIANTS)


@pytest.fixture(scope="module")
def done(file: Path) -> tuple[Study, Cells, dict[str, Result]]:
    study = load_study(file)
    cells = cells_of(study)
    return study, cells, run_study(study, cells)


def at(done: tuple[Study, Cells, dict[str, Result]], line: str, seed: int = 1) -> tuple[Path, Result]:
    study, cells, results = done
    cell = cells.shown[Place(line, "sums", seed)][0]
    return folder_of(study, cell), results[cell.key]


def test_every_place_has_its_numbers(done: tuple[Study, Cells, dict[str, Result]]) -> None:
    _, cells, results = done
    assert results.keys() == cells.by_key.keys()
    for cell, model in cells.shown.values():
        shown = results[cell.key].models[model]
        assert shown.sets["test"].rows == 6 and all(n > 0 for n in shown.sets["test"].tokens)
        assert shown.sets["test"].mean_nll is not None
        assert (shown.lam is None) == (model == "pilot")
    assert len({results[c.key].models[m].sets["test"].rows_id for c, m in cells.shown.values()}) == 1


def test_what_cells_share_is_trained_once(done: tuple[Study, Cells, dict[str, Result]]) -> None:
    folder, _ = at(done, "copilot")
    for line in ("late", "logits", "temperature", "ensemble", "latest"):
        assert (at(done, line)[0] / "pilot" / "final").resolve() == (folder / "pilot" / "final").resolve()
    assert (at(done, "logits")[0] / "copilot" / "final").resolve() == (folder / "copilot" / "final").resolve()
    assert (at(done, "transfer")[0] / "copilot" / "final").resolve() == (folder / "copilot" / "final").resolve()
    assert (at(done, "transfer")[0] / "pilot" / "final").resolve() != (folder / "pilot" / "final").resolve()
    trained = [path for path in folder.parent.glob("*/pilot/checkpoints") if path.is_dir()]
    assert len(trained) == 2 * 4, "hosts, longer, wider and the other Pilot of transfer, for two seeds"


def test_answers_are_those_of_plain_generation(done: tuple[Study, Cells, dict[str, Result]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, result = at(done, "copilot")
    pilot = AutoModelForCausalLM.from_pretrained(folder / "pilot" / "final", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "pilot" / "final")
    kept = result.models["pilot"].sets["test"]
    for row, example in enumerate(read_sets(folder / "data" / "test.parquet", 6)["test"]):
        ids = torch.tensor([example.prompt_ids])
        out = pilot.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert kept.correct[row] == matches(text, example.answer)
        gold = torch.tensor([example.input_ids])
        with torch.no_grad():
            log_probs = pilot(gold).logits[0, :-1].log_softmax(-1)
        nll = -log_probs.gather(1, gold[0, 1:, None])[example.target_start - 1 :].mean()
        assert kept.nll[row] == pytest.approx(float(nll), abs=2e-4)


def test_longer_has_the_copilots_compute_as_rounds(done: tuple[Study, Cells, dict[str, Result]]) -> None:
    _, base = at(done, "copilot")
    folder, longer = at(done, "longer")
    assert base.copilot_seconds > 0 and base.pilot_seconds > 0 and base.rounds == 6
    assert longer.rounds == int(6 * (1 + base.compute_share)) > 6
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [p["metrics"]["learning_rate"] for p in points if p["kind"] == "pilot"]
    assert rates[-1] < 0.2 * max(rates), "the schedule ends with the last round"


def test_wider_trains_as_many_parameters(done: tuple[Study, Cells, dict[str, Result]]) -> None:
    (_, base), (_, wider) = at(done, "copilot"), at(done, "wider")
    a_rank = base.pilot_parameters / 2
    assert abs(wider.pilot_parameters - base.pilot_parameters - base.copilot_parameters) <= a_rank / 2
    assert base.copilot_parameters > a_rank


def test_a_temperature_changes_no_answer(done: tuple[Study, Cells, dict[str, Result]]) -> None:
    (_, base), (_, scaled) = at(done, "copilot"), at(done, "temperature")
    before, after = base.models["pilot"].sets["test"], scaled.models["pilot"].sets["test"]
    assert after.right == before.right
    assert (scaled.models["pilot"].temperature == 1.0) == (after.nll == before.nll)


def test_the_latest_log_holds_the_same_rows_and_the_final_pilots_errors(
    done: tuple[Study, Cells, dict[str, Result]],
) -> None:
    from transformers import AutoModelForCausalLM

    host, _ = at(done, "copilot")
    latest, _ = at(done, "latest")
    columns = ["round", "sample_id", "seen", "input_ids", "target_start", "token_loss"]
    one, other = (MistakeLog(folder / "log").arrow(columns=columns).to_pylist() for folder in (host, latest))
    one, other = (sorted(rows, key=lambda row: (row["round"], row["sample_id"])) for rows in (one, other))
    same = columns[:5]
    assert [[row[c] for c in same] for row in one] == [[row[c] for c in same] for row in other]
    pilot = AutoModelForCausalLM.from_pretrained(host / "pilot" / "final", dtype=torch.float32)
    for row in other[:3]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = pilot(ids).logits[0, :-1].log_softmax(-1)
        loss = -log_probs.gather(1, ids[0, 1:, None])[row["target_start"] - 1 :, 0]
        np.testing.assert_allclose(loss, row["token_loss"], atol=1e-4)
    assert one[0]["token_loss"] != other[0]["token_loss"]


def test_mlflow_shows_the_runs_under_the_study(done: tuple[Study, Cells, dict[str, Result]]) -> None:
    study, cells, _ = done
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{study.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tc-ray").experiment_id], max_results=100)
    (parent,) = [run for run in runs if run.info.run_name == "tiny"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    trained = [cell for cell in cells.by_key.values() if cell.kind in ("run", "longer", "wider")]
    assert len(children) == len(trained) + len(cells.by_key) == len(runs) - 1
    assert parent.info.status == "FINISHED"


def test_a_finished_study_runs_nothing_and_shows_its_report(
    done: tuple[Study, Cells, dict[str, Result]], file: Path, tmp_path: Path
) -> None:
    study, cells, _ = done
    before = {path: path.stat().st_mtime_ns for path in (study.folder / "results").iterdir()}
    assert left_to_run(study, cells, results_of(study, cells)) == []
    run_study(study, cells)
    assert {path: path.stat().st_mtime_ns for path in (study.folder / "results").iterdir()} == before
    shown = tc_ray("study", file, "--report", tmp_path / "out.md")
    assert shown.returncode == 0, shown.stderr
    text = (tmp_path / "out.md").read_text()
    assert all(f"\n| {line} |" in text for line in cells.lines)
    plan = tc_ray("study", file, "--plan")
    assert f"{len(cells.by_key)} have a result" in plan.stdout and "to run     nothing" in plan.stdout
