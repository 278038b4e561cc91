"""The folder of a fused model: `pilot/`, `copilot/` and fusion.json, as `FusedModel.save_pretrained` writes it.

Invariant: the names of its parts and the format of fusion.json are defined here only. Loads neither torch nor transformers.
Used by `models.fusion.model` and by `export`, which adds what a run's export holds beyond a model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tc_ray.config.section import check_lam
from tc_ray.files import DamagedFileError, read_json, write_json

PILOT, COPILOT = "pilot", "copilot"
"""Folders of the two models; each loads with plain `from_pretrained`."""
ADAPTER = "adapter"
"""Folder of the Pilot's LoRA adapters, beside `pilot/final` of a run; loads with peft."""
FUSION_FILE = "fusion.json"
SPACES = ("probability", "logits")
FEEDBACKS = ("own", "realised")


class NoFusedModelError(FileNotFoundError):
    """The folder is not an exported fused model, or parts of it are missing."""


@dataclass(frozen=True)
class FusionSettings:
    """Default lambda, fusion space and feedback of an exported model (equation 8). Raises ValueError that names the field."""

    lam: float
    space: str
    feedback: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_lam(self.lam, "lam"))
        for name, choices in (("space", SPACES), ("feedback", FEEDBACKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(choices)}")

    @staticmethod
    def read(folder: Path) -> FusionSettings:
        """Read fusion.json. Raises DamagedFileError that names the file and the field for a bad value."""
        file = folder / FUSION_FILE
        settings: dict[str, Any] = read_json(file)
        try:
            return FusionSettings(*(settings.get(field.name) for field in fields(FusionSettings)))  # type: ignore[arg-type]
        except ValueError as error:
            raise DamagedFileError(f"{file}: {error}") from None

    def write(self, folder: Path) -> None:
        """Write fusion.json."""
        write_json(folder / FUSION_FILE, asdict(self))


def check_parts(folder: Path) -> None:
    """Raise NoFusedModelError that names the missing parts of a fused model's folder."""
    check_alone(folder)
    missing = missing_parts(folder)
    if missing:
        raise NoFusedModelError(f"{folder} is not an exported fused model: {', '.join(missing)} missing")


def missing_parts(folder: Path) -> list[str]:
    """Names of the files of a fused model, weights apart, that are missing or empty."""
    parts = (FUSION_FILE, f"{PILOT}/config.json", f"{COPILOT}/config.json")
    return [part for part in parts if not (folder / part).is_file() or not (folder / part).stat().st_size]


def check_alone(folder: Path) -> None:
    """Raise NoFusedModelError for the export of a run whose Copilot failed: a Pilot and fusion.json without a Copilot."""
    if missing_parts(folder) == [f"{COPILOT}/config.json"] and not (folder / COPILOT).exists():
        raise NoFusedModelError(
            f"{folder} holds a Pilot alone, copilot/config.json is missing: there is nothing to fuse. If the Copilot of a run "
            "failed, the run's command (`tc-ray train`) trains it again; pilot/ is an ordinary model folder"
        )
