"""Every small file of a run folder, torn in every way, at its reader: cosmetic ones stop nothing, the others fall back or are
refused by name. The same on a whole run: tests/cluster/run/test_main_job.py."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tc_ray
from tc_ray.cli.command import message
from tc_ray.config.load import load_saved_config, save_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.yaml_file import ConfigError
from tc_ray.copilot import from_log
from tc_ray.data.prepared.batches import TrainTable
from tc_ray.data.prepared.folder import SCHEMA
from tc_ray.evaluation.compare import line_of
from tc_ray.evaluation.rows import RowResult, RowSet, read_sets
from tc_ray.files import DamagedFileError, finite
from tc_ray.mistakelog.table.lease import LeaseHeldError
from tc_ray.pilot.checkpoint import find_checkpoints, latest_checkpoint, mark_complete
from tc_ray.run.folder import FolderLock
from tc_ray.run.state import check_resume
from tc_ray.tracking.mlflow_writer import open_run
from tc_ray.tracking.points import draw_losses, read_points
from tc_ray.tracking.statusfile import read_status
from tc_ray.tracking.tracker import Tracker
from tests.support.evaluation_samples import report_of
from tests.support.torn_files import FOLDER, torn, torn_forms

PACKAGE = Path(tc_ray.__file__).parent


def refused(call: Callable[[], object], name: str) -> None:
    """The call ends with one clear line that names the file."""
    with pytest.raises(Exception) as caught:
        call()
    text = message(caught.value)
    assert name in text and "TC_RAY_DEBUG" not in text and "\n" not in text, text


def tracked(folder: Path) -> RunConfig:
    """A run that was tracked and killed."""
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": folder}, "tracking": {"enabled": False}})
    tracker = Tracker(config, folder, {"rounds_total": 4, "copilot_steps_total": 8})
    for round in (1, 2, 3):
        tracker.pilot(round, {"loss": 1.0 / round, "tokens": 10})
    tracker.event("restart", "the Pilot goes on after round 1")
    tracker.finish("stopped")
    return config


def test_a_torn_status_stops_nothing(tmp_path: Path) -> None:
    """Fault 7: a truncated status.json ended the Tracker's constructor, and so each later start of the run."""
    config = tracked(tmp_path)
    path = tmp_path / "status.json"
    for name, form in torn_forms(path.read_bytes()).items():
        with torn(path, form):
            refused(lambda: read_status(tmp_path), "status.json")
            if form is FOLDER:
                continue  # cannot be written either, see below
            again = Tracker(config, tmp_path)
            again.pilot(4, {"loss": 0.1})
            again._ended.set()
            again.phase("train")
            status = read_status(tmp_path)
            assert status["restarts"] == 1 and status["pilot"]["round"] == 4, name
            assert [event["kind"] for event in status["events"]] == ["restart"], name


def test_torn_metrics_stop_nothing(tmp_path: Path) -> None:
    """Fault 7: a line of metrics.jsonl that was half written ended each later start of the run."""
    config = tracked(tmp_path)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    forms = {name: form for name, form in torn_forms(content).items() if form is not FOLDER}
    forms |= {f"{name}, then more": form + b"\n" + content for name, form in forms.items()}
    for name, form in forms.items():
        with torn(path, form):
            list(read_points(path))
            again = Tracker(config, tmp_path)
            again.pilot(4, {"loss": 0.1})
            again._ended.set()
            assert [p["round"] for p in read_points(path) if p["kind"] == "pilot"][-1] == 4, name
    path.write_bytes(path.read_bytes()[:200] + b"\0" * 9 + path.read_bytes()[200:])
    draw_losses(path, tmp_path / "losses.png")


def test_a_torn_mlflow_json_opens_a_new_mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 7. In place of MLflow, whose database takes seconds to make, stands what `open_run` asks of it."""
    made = []

    class Client:
        def __init__(self, tracking_uri: str) -> None: ...

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(lifecycle_stage="active", experiment_id="0")

        def create_run(self, *_: object, **__: object) -> Any:
            made.append(str(len(made)))
            return SimpleNamespace(info=SimpleNamespace(run_id=made[-1]))

        def get_run(self, run_id: str) -> Any:
            assert run_id in made
            info = SimpleNamespace(run_id=run_id, lifecycle_stage="active")
            return SimpleNamespace(info=info, data=SimpleNamespace(params={}))

        def log_batch(self, *_: object, **__: object) -> None: ...

        update_run = log_batch

    monkeypatch.setattr("tc_ray.tracking.mlflow_writer.MlflowClient", Client)
    config = RunConfig.model_validate({"run": {"folder": tmp_path}})

    def opened() -> str:
        return open_run(config, tmp_path).run_id

    first = opened()
    path = tmp_path / "mlflow.json"
    assert opened() == first
    for name, form in torn_forms(path.read_bytes()).items():
        if form is not FOLDER:
            with torn(path, form):
                again = opened()
                assert again == made[-1] != first, name
                assert opened() == again, name


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()  # as on a full disk: the write fails
    assert tracked(tmp_path).run.name == "trial"


def test_numbers_that_are_not_finite_leave_valid_json(tmp_path: Path) -> None:
    """Fault 7: NaN in an evaluation made a status.json that only Python reads."""
    config = tracked(tmp_path)
    tracker = Tracker(config, tmp_path)
    tracker.evaluation({"nll": float("nan"), "sweep": [{"nll": float("inf")}]}, "")
    tracker.pilot(4, {"loss": float("nan")})
    tracker.finish("done")
    text = (tmp_path / "status.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in status.json"))
    assert read_status(tmp_path)["evaluation"] == {"nll": None, "sweep": [{"nll": None}]}
    assert finite({"a": (1, float("-inf")), "b": True}) == {"a": [1, None], "b": True}


def checkpoint(root: Path, number: int) -> Path:
    folder = root / f"round-{number:06d}"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "weights.pt").write_bytes(b"x" * 100)
    mark_complete(folder, round_number=number, world_size=1, zero_stage=1, keep=2)
    return folder


def test_a_torn_marker_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    """Fault 7: a truncated newest complete.json ended the restart instead of falling back."""
    checkpoint(tmp_path, 5)
    newest = checkpoint(tmp_path, 10)
    for name in ("complete.json", "state/weights.pt"):
        for form in torn_forms((newest / name).read_bytes()).values():
            if name != "complete.json" and len(form) == 100:
                continue  # damage within a file of weights is for its own reader
            with torn(newest / name, form):
                found, damaged = find_checkpoints(tmp_path)
                assert [c.round for c in found] == [5]
                assert len(damaged) == 1 and "round-000010" in damaged[0] and "\n" not in damaged[0]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.round == 10
    assert find_checkpoints(tmp_path)[1] == []


def test_torn_checkpoints_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    """Fault 7: what is removed as old is counted from the checkpoints that can be loaded."""
    checkpoint(tmp_path, 5)
    (checkpoint(tmp_path, 10) / "complete.json").write_bytes(b"")
    checkpoint(tmp_path, 15)
    assert [c.round for c in find_checkpoints(tmp_path)[0]] == [5, 15]
    checkpoint(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000015", "round-000020"]


def test_a_config_that_was_cut_is_refused(tmp_path: Path) -> None:
    """Fault 7: half of a config.yaml is a config with the defaults of what is gone."""
    path = tmp_path / "config.yaml"
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": tmp_path}, "tracking": {"enabled": False}})
    save_config(config, path)
    assert load_saved_config(path) == config
    check_resume(config, tmp_path)
    content = path.read_bytes()
    for form in [*torn_forms(content).values(), *(content[:length] for length in range(0, len(content) - 1, 97))]:
        with torn(path, form):
            refused(lambda: load_saved_config(path), "config.yaml")
            if form is not FOLDER:
                refused(lambda: check_resume(config, tmp_path), "config.yaml")


def prepared(folder: Path) -> Path:
    """A data folder of one row a part."""
    folder.mkdir()
    for part in ("train", "validation", "test"):
        row = {"sample_id": 0, "input_ids": [1, 2], "target_start": 1, "prompt": "a", "completion": "b", "answer": "b"}
        row |= {"options": None, "set": None if part == "train" else part}
        pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), folder / f"{part}.parquet")
    return folder


def test_torn_rows_are_named_where_they_are_read(tmp_path: Path) -> None:
    path = prepared(tmp_path / "data") / "test.parquet"
    assert len(read_sets(path)["test"]) == 1
    for form in torn_forms(path.read_bytes()).values():
        with torn(path, form):
            refused(lambda: read_sets(path), "test.parquet")
            refused(lambda: TrainTable(path), "test.parquet")


def test_the_folder_of_a_copilot_from_a_log(tmp_path: Path) -> None:
    """Fault 7: a torn source.json is refused by name."""
    config = RunConfig.model_validate({"tracking": {"enabled": False}})
    mistakes: Any = SimpleNamespace(location="log", metadata=SimpleNamespace(run="trial"), version=3)

    def start() -> None:
        from_log._open_folder(tmp_path, config, mistakes, {"pilot_weights": "a", "copilot_weights": "b"})

    start(), start()
    for form in torn_forms((tmp_path / "source.json").read_bytes()).values():
        with torn(tmp_path / "source.json", form):
            refused(start, "source.json")
    (tmp_path / "config.yaml").unlink()  # a start that ended between the two files
    start()
    assert (tmp_path / "config.yaml").is_file()


def test_a_torn_run_lock_names_the_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "run first"):
        path = tmp_path / "run.lock"
        content = path.read_bytes()
        for form in torn_forms(content).values():
            if form is not FOLDER:
                path.write_bytes(form)  # in place: the lock is on the file
                with pytest.raises(LeaseHeldError, match="is in use: another run"):
                    FolderLock(tmp_path, "run second")
    path.write_bytes(b"garbage")
    FolderLock(tmp_path, "run third").__exit__()


def test_an_evaluation_is_valid_json_whatever_was_measured(tmp_path: Path) -> None:
    one = RowResult(0, 0, None, float("nan"), float("nan"), 1, "")
    line = line_of("m", RowSet("rows", "nll", [], ""), [one], [one], ("logits", 0.0), [10])
    example = {"prompt": "\udcff", "answer": "", "pilot": "", "fused": ""}
    report_of([line], [], 0.0, examples=[example]).save(tmp_path)
    text = (tmp_path / "report.json").read_text()
    saved = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in report.json"))
    assert saved["results"]["m"]["rows"]["value"] is None
    assert "rows" in (tmp_path / "report.md").read_text()


WRITERS = {
    "files.py",
    "inspection/samples.py",  # large files, synced before the rename
    "export/join.py",  # renames a folder that is synced and marked, never in place of another
    "export/pilot.py",  # so does it
    "run/inputs.py",  # moves what was prepared, and synced, aside
}


def test_small_files_are_written_in_one_place() -> None:
    """Fault 4: a file that is renamed without being synced is empty after a power cut. All writing goes through tc_ray.files."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in WRITERS or name.startswith("mistakelog/"):  # the log's files, in folders and object stores
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = node.func.attr
                owner = ast.unparse(node.func.value)
                if called in ("write_text", "write_bytes", "rename") or (called == "replace" and owner == "os"):
                    wrong.append(f"{name}:{node.lineno}: {owner}.{called}")
    assert not wrong, "\n".join(wrong)


def test_damage_is_a_value_error() -> None:
    """Readers that take any ValueError for "cannot be read" take damage too."""
    assert issubclass(DamagedFileError, ValueError) and issubclass(ConfigError, ValueError)
