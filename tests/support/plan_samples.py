"""Settings and rows of the runs whose plans are tested; the fixtures `tiny` and `data` of tests/unit/run go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tc_ray.config.schema import RunConfig

ROWS, BATCH = 96, 8


def config_of(pilot: Path, train: str, folder: Path, /, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "run": {"name": "plan", "folder": folder},
        "model": {"pilot": str(pilot)},
        "data": {"train": train, "validation_size": 0.125, "test_size": 8, "cutoff_tokens": 200},
        "pilot": {"batch_size": BATCH, "micro_batch_size": 4, "method": "full", "dtype": "fp32"},
        "copilot": {"layers": [1, 3]},
        "log": {"top_k": 16},
    }
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return RunConfig.model_validate(values)
