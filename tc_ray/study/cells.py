"""The cells of a study as a graph: what is trained once for several of them, and which line of the report each one makes.

Invariant: a cell's key follows from its kind, from what its settings, data and models hold, and from the keys of the cells that
it needs; not from names, folders or machines. So equal work is one cell, and a result is found again by its key.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tc_ray.config.fields import config_fields, public_values
from tc_ray.config.schema import RunConfig
from tc_ray.config.yaml_file import ConfigError
from tc_ray.models.identity import model_identity
from tc_ray.study.file import CONTROLS, PILOT, Study

VERSION = 1
"""Of what a cell does; part of every key."""
FUSED, ALONE = "fused", "pilot"
"""The models of a cell."""
_MODEL_OF = {name: FUSED if name in ("latest", "transfer") else ALONE for name in CONTROLS}
_DIVISION = (
    *(f"resources.{who}_{of}" for who in ("pilot", "copilot") for of in ("workers", "gpus")),
    "pilot.micro_batch_size",
    "pilot.zero_stage",
)
"""How the work is divided: no result follows from it but for dropout and rounding, and what is compared has it alike."""
_NO_CONTENT = ("run.name", "run.folder", "run.trust_folder", "model.cache")
_FILES = ("data.train", "data.validation", "data.test", "data.task")
_MODELS = ("model.pilot", "model.copilot")
_OF_COPILOT = ("copilot.", "fusion.", "model.copilot", "resources.copilot_")
_ASKED = (
    "fusion.metric",
    "fusion.choose_option_by",
    "fusion.max_new_tokens",
    "fusion.num_beams",
    "fusion.max_test_rows",
)
"""What the answers of a Pilot alone follow from, besides its training."""


@dataclass(frozen=True)
class Cell:
    """One job. kind: a name in `work.KINDS`. config: its settings; of `longer` and `wider`, those that are then raised.

    needs: cells whose folders (of `longer` and `wider`: whose result) it starts from. rows: that it is measured with.
    name: of its folder and in messages: task, variant and seed that asked for it first.
    """

    kind: str
    config: RunConfig
    needs: tuple[Cell, ...]
    rows: str
    name: str

    @cached_property
    def key(self) -> str:
        """16 hex digits."""
        parts = [VERSION, self.kind, self.rows, content(self.config), [cell.key for cell in self.needs]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        """Name of its folder among the cells of the study."""
        return f"{self.name.replace('/', '--')}-{self.key[:8]}"

    @property
    def wants_models(self) -> bool:
        """Whether it starts from the models of the cells that it needs, not from their results alone."""
        return self.kind not in ("longer", "wider")


class Place(NamedTuple):
    """Where a number of the report stands."""

    line: str
    task: str
    seed: int


@dataclass(frozen=True)
class Cells:
    """All cells of a study. lines: of the report, in order. shown: the cell and the model whose rows each place shows."""

    by_key: Mapping[str, Cell]
    lines: tuple[str, ...]
    shown: Mapping[Place, tuple[Cell, str]]


def cells_of(study: Study) -> Cells:
    """The graph of a study. Raises ConfigError."""
    by_key: dict[str, Cell] = {}
    shown: dict[Place, tuple[Cell, str]] = {}
    for task in study.file.tasks:
        for seed in study.file.seeds:
            for line, cell, model in _column(study, task, seed):
                for found in _with_needs(cell):
                    by_key.setdefault(found.key, found)
                shown[Place(line, task, seed)] = (by_key[cell.key], model)
    names = (line for name in study.file.variants for line in (name, name + PILOT))
    used = {place.line for place in shown}
    return Cells(by_key, tuple(line for line in names if line in used), shown)


def _with_needs(cell: Cell) -> Iterator[Cell]:
    for need in cell.needs:
        yield from _with_needs(need)
    yield cell


def _column(study: Study, task: str, seed: int) -> Iterator[tuple[str, Cell, str]]:
    """Line, cell and model of every variant of a task and seed."""
    hosts: dict[str, Cell] = {}
    shown_pilots: set[str] = set()
    for variant, values in study.file.variants.items():
        control = values.get("control")
        if control is not None:
            yield variant, _control(study, control, variant, task, seed), _MODEL_OF[control]
            continue
        config = study.config(task, seed, variant)
        cell = _variant(study, config, f"{task}/{variant}/{seed}", hosts)
        yield variant, cell, FUSED if config.log.enabled else ALONE
        if config.log.enabled:
            asked = _digest([pilot_key(config), [public_values(config)[name] for name in _ASKED]])
            if asked not in shown_pilots:
                yield variant + PILOT, cell, ALONE
            shown_pilots.add(asked)


def _variant(study: Study, config: RunConfig, name: str, hosts: dict[str, Cell]) -> Cell:
    """A run of its own, or what is left to do where an earlier variant has the same Pilot and log."""
    rows, trained = study.file.rows, pilot_key(config)
    if not config.log.enabled or trained not in hosts:
        cell = Cell("run", config, (), rows, name)
        if config.log.enabled:
            hosts[trained] = cell
        return cell
    host = hosts[trained]
    mine, its = content(config), content(host.config)
    if mine == its:
        return host
    same_copilot = all(mine[key] == its[key] for key in mine if not key.startswith("fusion."))
    return Cell("fusion" if same_copilot else "copilot", config, (host,), rows, name)


def _control(study: Study, control: str, variant: str, task: str, seed: int) -> Cell:
    rows, name, seeds = study.file.rows, f"{task}/{variant}/{seed}", study.file.seeds

    def host(of: int) -> Cell:
        return Cell("run", study.config(task, of, study.first), (), rows, f"{task}/{study.first}/{of}")

    first, config = host(seed), study.config(task, seed, study.first, variant)
    _check_takes_effect(study, control, variant, first.config, config)
    if control == "ensemble":
        return Cell(control, config, (first, host(seeds[(seeds.index(seed) + 1) % len(seeds)])), rows, name)
    if control == "transfer":
        pilot = Cell("run", without_log(config), (), rows, f"{task}/{variant}/{seed}/pilot")
        return Cell(control, config, (pilot, first), rows, name)
    if control in ("longer", "wider"):
        config = without_log(config)
    return Cell(control, config, (first,), rows, name)


def _check_takes_effect(study: Study, control: str, variant: str, first: RunConfig, config: RunConfig) -> None:
    """Refuse settings beside a control that change nothing: the report would say that they were there."""
    where = f"{study.places.get(('variants', variant), study.path)}: variants.{variant}"
    its = content(config)
    changed = [name for name, value in content(first).items() if its[name] != value]
    idle = {
        "latest": [name for name in changed if not name.startswith(("copilot.", "model.copilot", "fusion."))],
        "ensemble": [name for name in changed if not name.startswith("fusion.")],
        "temperature": changed,
    }.get(control, [name for name in changed if name.startswith(("copilot.", "model.copilot"))])
    if idle:
        raise ConfigError(
            f"{where}: {', '.join(idle)}: without effect, as {control} starts from what {study.first} trained"
        )
    if control == "temperature" and (config.fusion.num_beams > 1 or config.fusion.metric == "ranking"):
        raise ConfigError(f"{where}: temperature keeps the Pilot's greedy answers, and beams would find others")


def without_log(config: RunConfig) -> RunConfig:
    """The same training of a Pilot without log and Copilot."""
    changed = config.model_copy(deep=True)
    changed.copilot.schedule = "async"  # a lock step needs a log
    changed.log.enabled = False
    return changed


def pilot_key(config: RunConfig) -> str:
    """Equal for settings that train the same Pilot and leave the same log."""
    values = {name: value for name, value in content(config).items() if not name.startswith(_OF_COPILOT)}
    if config.log.rationale == "all":
        del values["log.pooling"]  # a log of all layers can be pooled in each way
    return _digest(values)


def content(config: RunConfig) -> dict[str, Any]:
    """What a cell's result follows from: settings by dotted name, files and model folders by what they hold."""
    fields = config_fields().values()
    kept = {
        field.path
        for field in fields
        if field.path.startswith("fusion.") or field.path in _DIVISION or not field.may_change
    } - set(_NO_CONTENT)
    if not config.log.enabled:
        kept = {name for name in kept if not name.startswith(("copilot.", "log.")) and name not in _MODELS[1:]}
        kept |= {"log.enabled"}
    values = {name: value for name, value in public_values(config).items() if name in kept}
    values["data.seed"] = config.data_seed
    for name in _FILES:
        values[name] = _of_files(values[name])
    for name in set(_MODELS) & kept:
        values[name] = _of_model(values[name])
    return values


def _of_files(source: Any) -> Any:
    """Of a path, or of named sets."""
    if isinstance(source, dict):
        return {name: {key: _of_file(value) for key, value in given.items()} for name, given in source.items()}
    if isinstance(source, list):
        return [given | {"file": _of_file(given["file"])} for given in source]
    return _of_file(source)


@cache
def _of_file(source: str | None) -> str | None:
    """A path or a pattern by the content of its files; a name that is neither, an address too, as it is."""
    path = Path(source) if source else None
    found = [path] if path is not None and path.exists() else sorted(map(Path, glob.glob(source or "", recursive=True)))
    if path is None or not found:
        return source
    digest = hashlib.sha256()
    files = [file for one in found for file in ([one] if one.is_file() else sorted(one.rglob("*"))) if file.is_file()]
    for file in files:
        digest.update(f"{os.path.relpath(file, path)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _of_model(name: str | None) -> str | None:
    folder = Path(name) if name else None
    return (
        name if folder is None or not (folder / "config.json").is_file() else model_identity(folder).rpartition("@")[2]
    )


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def placed(cell: Cell, folder: Path, uri: str | None, parent: str | None) -> RunConfig:
    """The settings of a cell as it runs: in `folder`, its MLflow run under that of the study."""
    config = cell.config.model_copy(deep=True)
    config.run.name, config.run.folder = cell.folder_name, folder
    config.tracking.uri, config.tracking.parent_run = uri or config.tracking.uri, parent
    return config
