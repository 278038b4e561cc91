"""The model card of an exported folder: README.md with the front matter that the hub reads.

Invariant: numbers are those of the run's own report, with rows and intervals; what is not known is said to be unknown. No path of
this machine and no secret stands in it. Used by `write` (a run's fused model) and `pilot` (`tc-ray export`).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from jinja2 import Environment, PackageLoader, StrictUndefined

import tc_ray
from tc_ray.config.redact import redact
from tc_ray.config.schema import RunConfig
from tc_ray.config.section import Metric
from tc_ray.evaluation.report import number, percent
from tc_ray.evaluation.scores import KNOWS_RIGHT, value_name
from tc_ray.export.check import ExportError
from tc_ray.export.licence import CARD, Licence, is_hub_id, licence_of
from tc_ray.files import read_json, write_file
from tc_ray.models.folder import FusionSettings
from tc_ray.models.hub import BUILTIN_MODELS

Kind = Literal["fused", "merged", "adapter", "gguf"]
LIBRARIES: dict[Kind, str] = {"fused": "tc-ray", "merged": "transformers", "adapter": "peft", "gguf": "gguf"}
"""`library_name` of the front matter."""
REPORT = Path("evaluation") / "report.json"
DATA = Path("data") / "data.json"
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class CardSource:
    """What a card is made of. report: as `Report.to_dict`, None where nothing was measured. fusion: of a fused model."""

    config: RunConfig
    licence: Licence
    data: Mapping[str, Any] | None
    report: Mapping[str, Any] | None
    encoder_decoder: bool
    fusion: FusionSettings | None = None

    @classmethod
    def of_run(
        cls,
        run: Path,
        config: RunConfig,
        model: Path,
        *,
        report: Mapping[str, Any] | None = None,
        fusion: FusionSettings | None = None,
    ) -> CardSource:
        """Of a run folder and the folder of its Pilot; without a report the run's own, if there is one."""
        if report is None and (run / REPORT).is_file():
            report = read_json(run / REPORT)
        data = read_json(run / DATA) if (run / DATA).is_file() else None
        shape = read_json(model / "config.json")
        licence = licence_of(config.model.pilot)
        return cls(config, licence, data, report, bool(shape.get("is_encoder_decoder")), fusion)


def write_card(folder: Path, kind: Kind, source: CardSource) -> None:
    """Write README.md, read it back as the hub reads it, and put the base's licence files beside it.

    Raises ExportError: the front matter is not what was meant.
    """
    from huggingface_hub import ModelCard

    for file in source.licence.files:
        write_file(folder / file.name, file.read_bytes())
    write_file(folder / CARD, card(kind, source))
    found = ModelCard.load(folder / CARD).data
    if (found.library_name, found.license) != (LIBRARIES[kind], source.licence.name):
        raise ExportError(f"{folder / CARD} has a front matter that the hub would misread: {found.to_dict()}")


def card(kind: Kind, source: CardSource) -> str:
    """The card's text."""
    from huggingface_hub import ModelCardData

    config, base = source.config, source.config.model.pilot
    builtin = BUILTIN_MODELS.get(base)
    tags = ["tc-ray", "transformer-copilot"]
    tags += ["lora"] if config.pilot.method == "lora" else []
    tags += ["gguf"] if kind == "gguf" else []
    head = ModelCardData(
        library_name=LIBRARIES[kind],
        base_model=builtin.base if builtin else base if is_hub_id(base) else None,
        license=source.licence.name,
        license_name=source.licence.title,
        license_link=source.licence.link,
        tags=tags,
        pipeline_tag="text2text-generation" if source.encoder_decoder else "text-generation",
    )
    loader = PackageLoader("tc_ray.export", "static")
    # Markdown: nothing is to be escaped as HTML
    templates = Environment(loader=loader, trim_blocks=True, undefined=StrictUndefined, autoescape=False)
    first = _first(source.report)
    made_by = {"tc-ray": tc_ray.__version__, "Python": platform.python_version()}
    text = templates.get_template("card.md").render(
        head=head.to_yaml(),
        kind=kind,
        name=config.run.name,
        base=shown(base),
        builtin=builtin,
        config=config,
        source=source,
        data_source=", ".join(shown(part) for part in str(source.data["source"]).split(", ")) if source.data else None,
        measured=_measured(kind, source.report or {}),
        alone=first.get("copilot") is None,
        verdict=first.get("verdict") if kind == "fused" else None,
        versions=made_by | {package: version(package) for package in PACKAGES},
    )
    return redact(text)


def shown(place: str) -> str:
    """A file or folder by its name alone; a hub id, an address or another name as it is."""
    path = Path(place).expanduser()
    return path.name if path.is_absolute() or path.exists() else place


def _first(report: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The run's own source in its report."""
    sources: Mapping[str, Any] = report["sources"] if report else {}
    return next(iter(sources.values()), {})


def _measured(kind: Kind, report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table: of the Pilot alone, and of a fused folder those of the fused model too."""
    name = next(iter(report.get("sources", {})), None)
    if name is None:
        return []
    has_copilot = report["sources"][name]["copilot"] is not None
    models = {f"{name}/pilot" if has_copilot else name: "Pilot"}
    if has_copilot and kind == "fused":
        models[name] = "fused"
    return [
        _line(label, dataset, line)
        for model, label in models.items()
        for dataset, line in report["results"].get(model, {}).items()
    ]


def _line(label: str, dataset: str, line: Mapping[str, Any]) -> dict[str, str]:
    metric = cast(Metric, line["metric"])
    ends: Sequence[Any] = (line["value"], line["low"], line["high"])
    digits = 2 if metric == "ranking" else 1
    value, low, high = (percent(end, digits) if metric in KNOWS_RIGHT else number(end, "%.4f") for end in ends)
    interval = f"{low} to {high}"
    cells = {"model": label, "set": dataset, "rows": str(line["rows"]), "measure": value_name(metric)}
    return cells | {"value": value, "interval": interval, "nll": number(line.get("nll"), "%.4f")}
