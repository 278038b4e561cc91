"""What each kind of cell does, in a Ray task of its own: train what is missing, measure, leave a result.

Invariant: every cell with a Copilot leaves a run folder (`config.yaml`, `data`, `pilot/final`, `copilot/final`), whose parts may be
links into the folders of cells that it shares them with. A cell that was cut off goes on from its last checkpoints. Its task holds
no CPU: whatever computes takes its own, so that a cell never waits for what it holds itself. Called by `schedule`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import tc_ray
from tc_ray.cluster.capacity import Need, ray_options
from tc_ray.cluster.session import copilot_need, evaluation_need
from tc_ray.config.fields import public_values
from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.copilot import checkpoint
from tc_ray.copilot.from_log import train_from_log
from tc_ray.evaluation.scores import decoded_as
from tc_ray.evaluation.teacher_forced import Text
from tc_ray.files import is_whole
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.models.identity import tensor_shapes
from tc_ray.models.pilot.load import DTYPES, load_pilot
from tc_ray.run.job import run_job
from tc_ray.run.plan.model_sizes import find_models, model_sizes
from tc_ray.study.cells import Cell
from tc_ray.study.latest import write_latest_log
from tc_ray.study.measure import answers_of, held, measure, with_correction
from tc_ray.study.pilots import AveragedPilots, best_temperature, results_by, scaled_sums
from tc_ray.study.results import Answers, Model, Result, find_result, without_folders
from tc_ray.tracking.mlflow_address import take_variables
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import METRICS_FILE


@dataclass(frozen=True)
class Done:
    """A cell that is done: its folder, which may be gone, and its result."""

    folder: Path
    result: Result


@dataclass(frozen=True)
class Work:
    """A cell at work. config: in its folder, with the Pilot's settings raised where the control says so."""

    cell: Cell
    config: RunConfig
    needs: tuple[Done, ...]

    @property
    def folder(self) -> Path:
        """Of the cell."""
        return self.config.run.path

    @property
    def host(self) -> Done:
        """The first cell that it needs."""
        return self.needs[0]


@dataclass(frozen=True)
class Costs:
    """See `results.Result`."""

    pilot_seconds: float
    copilot_seconds: float
    rounds: int
    pilot_parameters: int
    copilot_parameters: int


Made = tuple[dict[str, Model], Costs]
_Made = TypeVar("_Made")


def do_cell(
    cell: Cell,
    config: RunConfig,
    needs: tuple[Done, ...],
    results: Path,
    command: str,
    variables: Mapping[str, str] | None = None,
) -> Result:
    """Do a cell and save its result.

    Args:
        config: that of `cells.placed`.
        command: that it was asked for by.
        variables: `tracker_variables` of the study's process; this one may be on another machine.
    """
    started = time.time()
    take_variables(variables or {})
    if cell.kind in ("longer", "wider"):
        config = raised(cell, config, needs[0].result)
    models, costs = KINDS[cell.kind](Work(cell, config, needs))
    default = public_values(RunConfig())
    settings = {
        name: without_folders(value)
        for name, value in public_values(config).items()
        if value != default[name] and name not in ("run.name", "run.folder") and not name.startswith("tracking.")
    }
    made = {
        "tc_ray": tc_ray.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {_processor()}",
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }
    seconds = round(time.time() - started, 1)
    result = Result(cell.key, cell.kind, cell.name, settings, models, **asdict(costs), wall_seconds=seconds, made=made)
    if find_result(cell.key, [results]) is None:  # else it ran for its models: what others were made from stays
        result.save(results)
    return result


def raised(cell: Cell, config: RunConfig, base: Result) -> RunConfig:
    """The settings of `longer` and `wider`, from the result of the cell that they are about."""
    config = config.model_copy(deep=True)
    pilot = config.pilot
    if cell.kind == "longer":
        share = 1.0 + base.compute_share
        pilot.max_rounds = math.ceil(base.rounds * share)  # never less compute than the Copilot had
        pilot.epochs = -int(-pilot.epochs * share // 1)  # rounded up: enough rows for these rounds
    else:
        factor = (base.pilot_parameters + base.copilot_parameters) / base.pilot_parameters
        rank = round(pilot.lora.rank * factor)
        pilot.lora.alpha = max(1, round(pilot.lora.alpha * rank / pilot.lora.rank))  # the same scale of an adapter
        pilot.lora.rank = rank
    return config


def _run(work: Work) -> Made:
    run_job(work.config)
    return _measured(work), _costs_of_run(work.config)


def _copilot(work: Work) -> Made:
    """A Copilot of the host's log with other settings."""
    _link(work, {"data": work.host.folder, "pilot/final": work.host.folder})
    return _from_log(work, work.host.folder / "log", 0.0)


def _latest(work: Work) -> Made:
    _link(work, {"data": work.host.folder, "pilot/final": work.host.folder})
    log = work.folder / "log"
    seconds = with_room(work.config, write_latest_log, work.host.folder, log, work.host.result.rounds)
    return _from_log(work, log, seconds)


def _from_log(work: Work, log: Path, more_seconds: float) -> Made:
    config, target = work.config, work.folder / "copilot"
    if not is_whole(target / "final"):
        with_room(config, _train, log, target, need=copilot_need(config))
    points = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    base = work.host.result
    seconds = sum(point["compute_seconds"] for point in points) + more_seconds
    costs = Costs(base.pilot_seconds, seconds, base.rounds, base.pilot_parameters, _trained(target))
    return _measured(work), costs


def _train(config: RunConfig, log: Path, target: Path) -> None:
    with MistakeLog(log, storage_options=config.log.storage_options or None) as mistakes:
        train_from_log(mistakes, config, target)


def _fusion(work: Work) -> Made:
    """The host's models, joined or decoded otherwise."""
    host = work.host
    _link(work, {"data": host.folder, "pilot/final": host.folder, "copilot/final": host.folder})
    return _measured(work), _same(host.result)


def _transfer(work: Work) -> Made:
    pilot, host = work.needs
    _link(work, {"data": pilot.folder, "pilot/final": pilot.folder, "copilot/final": host.folder})
    costs = replace(_same(host.result), pilot_seconds=pilot.result.pilot_seconds, rounds=pilot.result.rounds)
    return _measured(work), costs


def _measured(work: Work) -> dict[str, Model]:
    """The models of the cell's run folder."""
    models = measure(work.config, work.cell.rows)
    if "fused" in models:
        models["fused"] = with_room(work.config, with_correction, work.cell.rows, models["fused"])
    return models


def _temperature(work: Work) -> Made:
    """The Pilot's own greedy answers; the NLL can change, and which option is the likeliest."""
    _link(work, {"data": work.host.folder, "pilot/final": work.host.folder})
    answers = work.host.result.models["pilot"].sets[work.cell.rows]
    model = with_room(work.config, _scaled, work.cell.rows, answers)
    return {"pilot": model}, _alone(_same(work.host.result))


def _scaled(config: RunConfig, part: str, answers: Answers) -> Model:
    found = held(config, part)
    texts = [Text(row.input_ids, row.target_start) for row in found.validation.rows]
    temperature = best_temperature(found.pilot, texts)
    decoded = decoded_as(found.rows.metric)
    # what was decoded does not matter here: greedy answers and rankings are those of the Pilot
    said = [("" if decoded == "said" else (None, "")) for _ in found.rows.rows] if decoded else None
    results = results_by(found.rows, found.tokenizer, scaled_sums(found.pilot, temperature), said)
    made = answers_of(found.rows, results)
    return Model({part: replace(answers, nll=made.nll) if decoded else made}, temperature=temperature)


def _ensemble(work: Work) -> Made:
    first, second = work.needs
    _link(work, {"data": first.folder, "pilot/final": first.folder})
    model = with_room(work.config, _averaged, work.cell.rows, second.folder)
    costs = replace(
        _same(first.result),
        pilot_seconds=first.result.pilot_seconds + second.result.pilot_seconds,
        pilot_parameters=2 * first.result.pilot_parameters,
    )
    return {"pilot": model}, _alone(costs)


def _averaged(config: RunConfig, part: str, second: Path) -> Model:
    found = held(config, part)
    other = load_pilot(second / "pilot" / "final", dtype=DTYPES[config.pilot.dtype]).eval()
    both = AveragedPilots(found.pilot, other.to(found.pilot.device))
    said = both.said(found.rows, found.tokenizer, config.fusion, found.labels)
    return Model({part: answers_of(found.rows, results_by(found.rows, found.tokenizer, both.sums, said))})


def with_room(config: RunConfig, work: Callable[..., _Made], *arguments: Any, need: Need | None = None) -> _Made:
    """work(config, *arguments) in a Ray task that has the resources of one worker. Raises what it raises.

    need: of such workers; None: those of the evaluation.
    """
    import ray

    options = {**ray_options((need or evaluation_need(config)).bundle), "max_calls": 1, "max_retries": 0}
    try:
        made: _Made = ray.get(ray.remote(**options)(work).remote(config, *arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return made


def _link(work: Work, parts: Mapping[str, Path]) -> None:
    """Make the cell's folder a run folder: parts by name, each from the folder that has it."""
    for name, owner in parts.items():
        link = work.folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(owner / name)
    save_config(work.config, work.folder / "config.yaml")


def _same(result: Result) -> Costs:
    return Costs(*(getattr(result, known.name) for known in fields(Costs)))


def _alone(costs: Costs) -> Costs:
    return replace(costs, copilot_seconds=0.0, copilot_parameters=0)


def _costs_of_run(config: RunConfig) -> Costs:
    workers = {"pilot": config.resources.pilot_workers, "copilot": config.resources.copilot_workers}
    seconds, rounds = dict.fromkeys(workers, 0.0), 0
    for point in read_points(config.run.path / METRICS_FILE):
        if point["kind"] in workers:
            seconds[point["kind"]] += workers[point["kind"]] * (point["metrics"].get("compute_seconds") or 0.0)
        if point["kind"] == "pilot":
            rounds = max(rounds, point["round"])
    found, _ = find_models(config, [], [])
    assert found is not None, "the run has just used the model"
    trained = model_sizes(config, found, None, None).pilot_trainable
    of_copilot = _trained(config.run.path / "copilot") if config.log.enabled else 0
    return Costs(seconds["pilot"], seconds["copilot"], rounds, trained, of_copilot)


def _trained(copilot: Path) -> int:
    """Trained parameters of a Copilot, by its newest checkpoint."""
    at = checkpoint.latest(copilot / "checkpoints")
    assert at is not None, "a trained Copilot has a checkpoint"
    shapes = tensor_shapes(checkpoint.folder_of(copilot / "checkpoints", at) / "trainable.safetensors")
    return sum(math.prod(shape) for shape in shapes.values())


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", known.read_text() if known.exists() else "")
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


KINDS: Mapping[str, Callable[[Work], Made]] = {
    "run": _run,
    "longer": _run,
    "wider": _run,
    "copilot": _copilot,
    "fusion": _fusion,
    "latest": _latest,
    "transfer": _transfer,
    "temperature": _temperature,
    "ensemble": _ensemble,
}
