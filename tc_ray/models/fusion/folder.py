"""The folder of an exported fused model: `pilot/`, `copilot/` and fusion.json.

Used by `FusedModel.save_pretrained` and `from_pretrained`, the export of a run and `tc-ray fuse`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FUSION_FILE = "fusion.json"
FORMAT = 1


@dataclass(frozen=True)
class FusionSettings:
    """Default lambda, fusion space and feedback of an exported model."""

    lam: float
    space: str
    feedback: str


def write_settings(folder: Path, *, lam: float, space: str, feedback: str) -> None:
    """Write fusion.json."""
    settings = {"format": FORMAT, **asdict(FusionSettings(lam, space, feedback))}
    (folder / FUSION_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(folder: Path) -> FusionSettings:
    """Read fusion.json after checking that every part of the folder is there.

    Raises:
        FileNotFoundError: a part is missing; the message names it. ValueError: a format this version does not know.
    """
    alone = all((folder / part).is_file() for part in ("pilot/config.json", FUSION_FILE))
    if alone and not (folder / "copilot").exists():
        raise FileNotFoundError(
            f"{folder} holds a Pilot alone, copilot/config.json is missing: where the Copilot of a run failed, the run's "
            "command trains it anew; pilot/ is an ordinary model folder"
        )
    for part in ("pilot/config.json", "copilot/config.json", FUSION_FILE):
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder} is not an exported fused model: {part} is missing")
    settings = json.loads((folder / FUSION_FILE).read_text())
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{folder / FUSION_FILE}: format {settings.get('format')} is not known; this version reads {FORMAT}"
        )
    return FusionSettings(settings["lam"], settings["space"], settings["feedback"])
