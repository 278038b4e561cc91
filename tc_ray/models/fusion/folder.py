"""The folder of an exported fused model: `pilot/`, `copilot/` and fusion.json.

Used by `FusedModel.save_pretrained` and `from_pretrained`, the export of a run and `tc-ray fuse`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tc_ray.config.section import check_lam
from tc_ray.files import read_json, write_json
from tc_ray.models.fusion.distribution import SPACES
from tc_ray.models.fusion.feedback import FEEDBACKS

FUSION_FILE = "fusion.json"
FORMAT = 1


@dataclass(frozen=True)
class FusionSettings:
    """Default lambda, fusion space and feedback of an exported model."""

    lam: float
    space: str
    feedback: str


class NoFusedModelError(FileNotFoundError):
    """The folder is no exported fused model, or not a whole one."""


def write_settings(folder: Path, *, lam: float, space: str, feedback: str) -> None:
    """Write fusion.json. Raises ValueError for what `read_settings` would refuse."""
    settings = {"format": FORMAT, **asdict(FusionSettings(lam, space, feedback))}
    _checked(settings, folder / FUSION_FILE)
    write_json(folder / FUSION_FILE, settings)


def read_settings(folder: Path) -> FusionSettings:
    """Read fusion.json after checking that every part of the folder is there.

    Raises:
        NoFusedModelError: a part is missing; the message names it.
        ValueError: a format this version does not know, or a setting that is none; the message names it.
    """
    alone = all((folder / part).is_file() for part in ("pilot/config.json", FUSION_FILE))
    if alone and not (folder / "copilot").exists():
        raise FileNotFoundError(
            f"{folder} holds a Pilot alone, copilot/config.json is missing: where the Copilot of a run failed, the run's "
            "command trains it anew; pilot/ is an ordinary model folder"
        )
    for part in ("pilot/config.json", "copilot/config.json", FUSION_FILE):
        if not (folder / part).is_file():
            raise NoFusedModelError(f"{folder} is not an exported fused model: {part} is missing")
    return _checked(read_json(folder / FUSION_FILE), folder / FUSION_FILE)


def _checked(settings: Any, file: Path) -> FusionSettings:
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else settings
        raise ValueError(f"{file}: format {found} is not known; this version reads {FORMAT}")
    for name, choices in (("space", SPACES), ("feedback", tuple(FEEDBACKS))):
        if settings.get(name) not in choices:
            raise ValueError(f"{file}: {name} is {settings.get(name)!r}, not one of {', '.join(choices)}")
    return FusionSettings(check_lam(settings.get("lam"), f"{file}: lam"), settings["space"], settings["feedback"])
