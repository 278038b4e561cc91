"""The folder of an exported fused model: `pilot/`, `copilot/` and fusion.json.

Used by `FusedModel.save_pretrained` and `from_pretrained`, the export of a run and `tc-ray fuse`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tc_ray.files import read_json

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
    """Write fusion.json."""
    settings = {"format": FORMAT, **asdict(FusionSettings(lam, space, feedback))}
    (folder / FUSION_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(folder: Path) -> FusionSettings:
    """Read fusion.json after checking that every part of the folder is there.

    Raises:
        NoFusedModelError: a part is missing; the message names it. ValueError: a format this version does not know.
    """
    for part in ("pilot/config.json", "copilot/config.json", FUSION_FILE):
        if not (folder / part).is_file():
            raise NoFusedModelError(f"{folder} is not an exported fused model: {part} is missing")
    settings = read_json(folder / FUSION_FILE)
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{folder / FUSION_FILE}: format {settings.get('format')} is not known; this version reads {FORMAT}"
        )
    return FusionSettings(settings["lam"], settings["space"], settings["feedback"])
