"""A pool without Ray, a tiny fused model that says different things at different lambdas, and held-out rows for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tc_ray.config.section import Metric
from tc_ray.evaluation.choose import Chosen
from tc_ray.evaluation.passes import Pass
from tc_ray.evaluation.pool import Pool
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.rows import HeldOut, RowSet
from tc_ray.evaluation.sources import ModelSource
from tc_ray.evaluation.worker import EvaluationWorker
from tc_ray.models.copilot import Copilot
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tests.support.tiny_model import make_tiny_llama


def tiny_fused(folder: Path, **given: Any) -> FusedModel:
    """A Pilot with spread logits and a Copilot that often overrules it."""
    path = make_tiny_llama(folder / "llama", scale=4.0)
    pilot = load_pilot(path, dtype=torch.float32)
    with torch.no_grad():
        pilot.model.norm.weight.mul_(8.0)
    torch.manual_seed(6)
    copilot = Copilot.from_decoder(path, [0, 1], pilot=pilot, **given)
    with torch.no_grad():
        copilot.output.weight.normal_(std=0.4)
    return FusedModel.join(pilot, copilot)


def held_out(count: int = 7, seed: int = 2) -> list[HeldOut]:
    """Random rows of unlike lengths, each with gold tokens."""
    rng = np.random.default_rng(seed)
    return [
        HeldOut(i, rng.integers(2, 258, length).tolist(), int(rng.integers(2, length - 1)), "", f"prompt {i}", "gold")
        for i, length in enumerate(rng.integers(5, 16, count).tolist())
    ]


def row_set(rows: list[HeldOut], metric: Metric = "exact_match", name: str = "test", **more: Any) -> RowSet:
    """The rows as a set."""
    return RowSet(name, metric, rows, "made up", **more)


def source(name: str = "m", *, fused: bool = True, **more: Any) -> ModelSource:
    """A source whose model `HerePool` has already."""
    return ModelSource(name, "pilot", "copilot" if fused else None, "fp32", f"weights of {name}", **more)


class HerePool:
    """Computes passes in this process, all rows in one batch. models: (model, tokenizer) by source. passes: what was asked."""

    def __init__(self, **models: tuple[Any, Any]) -> None:
        self.models, self.passes, self.keys = models, list[Pass](), set[str]()

    def run(self, job: Pass) -> list[Any]:
        """As `Pool.run`."""
        self.passes.append(job)
        self.keys.add(job.key)
        worker = _Here(self.models[job.source.name])
        found = worker.compute(job, list(enumerate(job.rows.rows)), self.folder / job.key)
        return [found[number] for number in range(len(job.rows.rows))]

    folder = Path("/nonexistent")

    def at(self, folder: Path) -> Pool:
        """Itself, with a folder for parts."""
        self.folder = folder / "parts"
        return cast(Pool, self)


class _Here(EvaluationWorker):
    def __init__(self, model: tuple[Any, Any]) -> None:
        self._loaded = model

    def _model(self, job: Pass) -> tuple[Any, Any]:
        if isinstance(self._loaded[0], FusedModel):
            self._loaded[0].feedback = job.feedback
        return self._loaded


def report_of(lines: list[Any], pairs: list[Any], lam: float, *, no_copilot: str | None = None, **more: Any) -> Report:
    """A report of one source named m."""
    chosen = Chosen("logits", lam, "own", "chosen on 9 validation rows", 9)
    of = replace(source(fused=no_copilot is None), no_copilot=no_copilot)
    data = {line.set: "rows" for line in lines}
    return Report(lines, pairs, {"m": of}, {"m": chosen}, data, **more)
