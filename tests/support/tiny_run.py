"""A whole run in miniature: the real job's configuration over the tiny Llama, and what a run's log must look like."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import RoundOrder
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.tracking.statusfile import read_status

SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny"},
    "data": {
        "template": "plain",
        "plain_template": "{prompt}=",
        "embedded_rows": 120,
        "validation_size": 12,
        "test_size": 12,
    },
    "pilot": {
        "method": "full",
        "dtype": "fp32",
        "learning_rate": 1e-3,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_rounds": 10,
        "epochs": 20,
        "checkpoint_every_rounds": 5,
    },
    "log": {"top_k": 8, "flush_rounds": 2},
    "copilot": {
        "dtype": "fp32",
        "batch_size": 8,
        "steps_per_round": 2,
        "checkpoint_every_steps": 10,
        "buffer_rounds": 32,
    },
    "fusion": {
        "lam_grid": [0.0, 0.5],
        "max_new_tokens": 4,
        "max_validation_rows": 6,
        "max_test_rows": 6,
        "eval_batch_size": 6,
    },
    "tracking": {"enabled": False},
}


def tiny_config(folder: Path, **overrides: Any) -> RunConfig:
    """Config of a run in `folder`/run over a tiny Llama in `folder`/model; overrides as section__field=value."""
    model = folder / "model"
    if not model.exists():
        from tests.support.tiny_model import make_tiny_llama

        make_tiny_llama(model)
    sections: dict[str, dict[str, Any]] = {name: dict(fields) for name, fields in SETTINGS.items()}
    sections["run"]["folder"] = folder / "run"
    sections["model"] = {"pilot": str(model)}
    for key, value in overrides.items():
        section, field = key.split("__", 1)
        sections.setdefault(section, {})[field] = value
    return RunConfig.model_validate(sections)


def assert_log_is_exact(config: RunConfig, rounds: int, rows: int) -> None:
    """Each (round, sample) of the run is in the log once and nothing else is; `rows`: training rows."""
    pilot = config.pilot
    order = RoundOrder(rows, pilot.batch_size, pilot.epochs, config.run.seed)
    wanted = {(number, int(row)) for number in range(1, rounds + 1) for row in order.sample_rows(number)}
    log = MistakeLog(config.log_location, storage_options=config.log.storage_options)
    table = log.arrow(columns=["round", "sample_id"])
    found = Counter(zip(table["round"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
    doubled = [key for key, count in found.items() if count > 1]
    assert not doubled, f"more than once in the log: {sorted(doubled)[:5]}"
    assert found.keys() == wanted, (
        f"missing {sorted(wanted - found.keys())[:5]}, too much {sorted(found.keys() - wanted)[:5]}"
    )


class Killer:
    """Watches a run's status.json from a thread and sends SIGKILL to one of its processes once `ready` is true.

    Args:
        folder: run folder. process: name in the status (`pilot-0`, `copilot-0`).
        ready: of a status; the process is killed the first time it is true.
    """

    def __init__(self, folder: Path, process: str, ready: Callable[[dict[str, Any]], bool]) -> None:
        self._folder, self._process, self._ready = folder, process, ready
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.killed_at: float | None = None
        self.status: dict[str, Any] = {}

    def __enter__(self) -> Killer:  # noqa: PYI034 - Self needs Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            try:
                status = read_status(self._folder)
            except FileNotFoundError:
                continue
            if self._process in status["processes"] and self._ready(status):
                os.kill(status["processes"][self._process], signal.SIGKILL)
                self.killed_at, self.status = time.time(), status
                return
