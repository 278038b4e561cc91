"""STUDY.yaml: a base recipe, its tasks, variants and seeds, and what the report shows.

Invariant: a refusal is a ConfigError that names file, line and field, as for a recipe; nothing unknown is ignored. A cell's
config is the recipe with the values of its task, then of its variant, over it.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tc_ray.config.environment import expand
from tc_ray.config.fields import names_in
from tc_ray.config.load import Layer, load_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.section import Section
from tc_ray.config.yaml_file import ConfigError, KeyPath, find_recipe, read_sections

CONTROLS = {
    "longer": "the Pilot alone, trained for as many more rounds as its Copilot cost, along a stretched schedule",
    "wider": "the Pilot alone, its LoRA rank raised until it trains as many parameters as Pilot and Copilot",
    "ensemble": "the mean of the probabilities of the Pilots of this seed and the next one",
    "temperature": "the Pilot alone at the temperature of the lowest NLL on validation rows",
    "latest": "a Copilot trained on the errors of the final Pilot alone, on the same rows (table 16)",
    "transfer": "the Copilot of the first variant with a Pilot trained otherwise (table 3)",
}
"""What a variant may be instead of settings alone; all are about the first variant."""
PILOT = "/pilot"
"""Ends the name of the line of a variant's Pilot alone."""
_SET_HERE = ("run.name", "run.folder", "run.seed", "tracking.parent_run")
_CELLS = ("tasks", "variants")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, Field(pattern=_NAME)]
Values = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class StudyFile(Section):
    """The document."""

    name: Name = Field(description="what the study is called")
    folder: Path | None = Field(None, description="where its cells are kept; default outputs/studies/<name>")
    recipe: str = Field(description="recipe of every cell: a file, or the name of a recipe of tc-ray")
    results: Path | None = Field(
        None, description="folder of results that are read first: cells found there are not run again"
    )
    rows: Literal["test", "validation"] = Field(
        "test", description="what is measured; validation: to settle choices without a look at the test rows"
    )
    keep_models: bool = Field(
        True, description="false: weights and logs of a cell go once its result is kept and no other cell needs them"
    )
    seeds: Annotated[list[int], Field(min_length=1)] = Field(description="run.seed of each repetition")
    tasks: Annotated[dict[Name, Values], Field(min_length=1)] = Field(description="columns: settings of each task")
    variants: Annotated[dict[Name, Values], Field(min_length=1)] = Field(
        description="lines: settings of each variant, or `control` and settings; the first one is what controls are about"
    )
    tables: dict[str, list[str]] = Field(
        default_factory=dict, description="tables of the report: title to lines; default: one of all lines"
    )
    against: list[str] = Field(
        default_factory=list, description="lines that every other line is tested against; default: the first variant"
    )

    @model_validator(mode="after")
    def _fits(self) -> StudyFile:
        first = next(iter(self.variants))
        for name, values in self.variants.items():
            control = values.get("control")
            if "control" in values and str(control) not in CONTROLS:
                raise ValueError(f"variants.{name}.control is {control!r}, not one of {', '.join(CONTROLS)}")
            if control is not None and name == first:
                raise ValueError(f"variants.{name} comes first: controls are about the first variant, so it is none")
            if control == "ensemble" and len(self.seeds) < 2:
                raise ValueError(f"variants.{name}: an ensemble joins the Pilots of two seeds; seeds has one")
            if control == "transfer" and len(values) == 1:
                raise ValueError(f"variants.{name}: transfer needs settings of the other Pilot, say pilot.lora.rank")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names a seed twice")
        known = [line for name in self.variants for line in (name, name + PILOT)]
        for where, lines in [("against", self.against), *((f"tables.{k}", v) for k, v in self.tables.items())]:
            for line in lines:
                if line not in known:
                    near = difflib.get_close_matches(line, known, n=2)
                    advice = f"did you mean {' or '.join(near)}?" if near else f"lines are {', '.join(self.variants)}"
                    raise ValueError(f"{where} names {line!r}, which is no variant; {advice}")
        return self


@dataclass(frozen=True)
class Study:
    """A study's file, checked. places: file and line of each key."""

    file: StudyFile
    path: Path
    places: Mapping[KeyPath, str]

    @cached_property
    def folder(self) -> Path:
        """Absolute folder of the study."""
        return (self.file.folder or Path("outputs") / "studies" / self.file.name).expanduser().absolute()

    @property
    def result_folders(self) -> list[Path]:
        """Where results are looked for, in this order; new ones go to the last."""
        given = self.file.results
        first = [] if given is None else [self._place(given)]
        return [*first, self.folder / "results"]

    @property
    def first(self) -> str:
        """The variant that controls are about."""
        return next(iter(self.file.variants))

    @property
    def against(self) -> list[str]:
        """Lines that the others are tested against."""
        return self.file.against or [self.first]

    def config(self, task: str, seed: int, *variants: str) -> RunConfig:
        """Settings of a cell, without its name and folder: those of the task, then of each variant. Raises ConfigError."""
        fixed: dict[str, Any] = {"run.seed": seed, "data.seed": self.file.seeds[0]}
        fixed |= {"tracking.log_model": False, "tracking.register": None}
        layers = [Layer(fixed, dict.fromkeys(fixed, f"{self.path}: seeds"), self.path.parent)]
        layers += [self._layer("tasks", task), *(self._layer("variants", variant) for variant in variants)]
        return load_config(find_recipe(self._place(Path(self.file.recipe))), layers=layers)

    def _layer(self, part: str, name: str) -> Layer:
        values: dict[str, Any] = {}
        places: dict[str, str] = {}

        def take(field: str, value: Any, place: KeyPath) -> None:
            if isinstance(value, dict) and names_in(tuple(field.split("."))):
                for key, inner in value.items():
                    take(f"{field}.{key}", inner, (*place, str(key)))
                return
            where = self.places.get(place, str(self.path))
            if field in _SET_HERE:
                raise ConfigError(f"{where}: {field} is set by the study; leave it out")
            values[field], places[field] = value, where

        for key, value in getattr(self.file, part)[name].items():
            if (part, key) != ("variants", "control"):
                take(key, value, (part, name, key))
        return Layer(values, places, self.path.parent)

    def _place(self, path: Path) -> Path:
        """A path of the file, from its own folder, else from the current one."""
        beside = self.path.parent / path.expanduser()
        return beside if beside.exists() else path.expanduser()


def load_study(path: Path) -> Study:
    """Read and check a study's file, every cell's settings too. Raises ConfigError."""
    places: dict[KeyPath, str] = {}
    values = read_sections(path, places, StudyFile.model_fields)
    own = {name: value for name, value in values.items() if name not in _CELLS}  # a cell's are expanded with its config
    try:
        values |= expand(own, (), places, str(path))
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_messages(error, places, path))) from None
    study = Study(file, path.absolute(), places)
    for task in file.tasks:
        for variant in file.variants:
            control = file.variants[variant].get("control")
            config = study.config(task, file.seeds[0], *([study.first] if control else []), variant)
            if control == "wider" and config.pilot.method != "lora":
                raise ConfigError(f"{places['variants', variant]}: wider raises the LoRA rank; pilot.method is full")
            _check_whole_log(path, config)
            _check_data(f"{path}, task {task}, variant {variant}", config, file.rows)
            if variant == study.first and not config.log.enabled:
                raise ConfigError(f"{places['variants', variant]}: the first variant needs a Copilot (log.enabled)")
    return study


def _check_whole_log(path: Path, config: RunConfig) -> None:
    """Other cells are trained from a cell's log."""
    log = config.log
    if log.path is not None:
        raise ConfigError(f"{path}: log.path is {log.path}: each cell keeps its log in its own folder")
    if log.keep_rounds is not None or log.max_bytes is not None or log.full_policy == "drop":
        raise ConfigError(
            f"{path}: log.keep_rounds, log.max_bytes and log.full_policy drop leave parts of a log out: each cell keeps its "
            "whole log, as others are trained from it"
        )


def _check_data(where: str, config: RunConfig, part: str) -> None:
    """Before hours of training: files are there, in place of which `data.fallback` would train on other rows, and one set is shown."""
    sets = config.data.held_out_sets("test")
    given = [
        *(("train", of.file) for of in config.data.train_sources()),
        *(("validation", of.file) for of in config.data.held_out_sets("validation").values()),
    ]
    for name, file in [*given, *(("test", of.file) for of in sets.values())]:
        if "://" not in file and not Path(file).exists() and not glob.glob(file, recursive=True):
            raise ConfigError(f"{where}: data.{name} is {file}: no such file or folder; a study uses no data.fallback")
    if part == "test" and len(sets) > 1:
        raise ConfigError(f"{where}: data.test has the sets {', '.join(sets)}: in a study give each a task of its own")


def _messages(error: ValidationError, places: Mapping[KeyPath, str], path: Path) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        key = tuple(str(part) for part in problem["loc"] if part != "[key]")
        found = next((places[key[:size]] for size in range(len(key), 0, -1) if key[:size] in places), str(path))
        text = str(problem["msg"]).removeprefix("Value error, ").replace("Input should", "it should")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key[-1], StudyFile.model_fields, n=2)
            valid = " or ".join(near) if near else ", ".join(StudyFile.model_fields)
            text = f"unknown key; {'did you mean' if near else 'valid here:'} {valid}{'?' * bool(near)}"
        elif problem["type"] == "missing":
            known = StudyFile.model_fields.get(key[-1])
            text = f"is missing ({known.description})" if known else "is missing"
        lines.append(f"{found}: {'.'.join(key)}: {text}" if key else f"{found}: {text}")
    return lines
