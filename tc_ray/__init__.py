"""tc-ray: fine-tune language models that learn from their own mistakes, on Ray.

Folders: run (one run, phase by phase, and the takeover of a stale one), config, data, models (the paper's equations),
pilot (trains), mistakelog (a record is written in `mistakelog/write`), copilot (learns from the log), evaluation
(lambda is chosen in `statistics.py`), export, serving (a request enters the batch in `serving/engine`), inspection,
tracking, cluster (the Ray session), cli. Read first: `run/job.py`, the story of a run. Importing this package imports
neither torch nor ray: the four names of `__all__` are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tc_ray.config.load import load_config
    from tc_ray.mistakelog.read.reader import MistakeLog
    from tc_ray.models.fusion import FusedModel
    from tc_ray.run.job import run_job

__version__ = "0.1.0"
__all__ = ["FusedModel", "MistakeLog", "load_config", "run_job"]

_PLACES = {
    "FusedModel": "tc_ray.models.fusion",
    "MistakeLog": "tc_ray.mistakelog.read.reader",
    "load_config": "tc_ray.config.load",
    "run_job": "tc_ray.run.job",
}


def __getattr__(name: str) -> Any:
    """Load one of the public names (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
