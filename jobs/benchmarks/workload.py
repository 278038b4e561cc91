"""What the benchmarks share: the model, random batches of given lengths, the machine line, medians and the table.

The batches are random token ids: time does not depend on what they say, and no data file is needed. Used by
every script here, each of which puts the repository's root on sys.path before it imports this.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.config.training import fast_dtype
from tc_ray.models.hub import resolve_model

BUILTIN = "smollm2-135m-instruct"
TOP_K = LogSection().top_k
DTYPE = "bf16" if torch.cuda.is_available() else fast_dtype()
"""What this machine computes fast: bf16 without instructions for it would take an hour."""
"""Errors logged per target token."""


@dataclass(frozen=True)
class Batch:
    """One Pilot micro-batch: int64 arrays as the training loop has them, [B, S] and [B]."""

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    target_start: NDArray[np.int64]
    sample_id: NDArray[np.int64]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, lengths, target_start) for the Pilot's forward."""
        return torch.from_numpy(self.input_ids), torch.from_numpy(self.lengths), torch.from_numpy(self.target_start)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    @property
    def target_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int((self.lengths - self.target_start).sum())


def make_batch(
    number: int, *, batch_size: int, tokens: int, targets: int, vocab_size: int, target_ids: int | None = None
) -> Batch:
    """Batch `number` of a seeded series: sequences of `tokens`, give or take a fifth, of which `targets` are completion.

    Completions use the first `target_ids` ids only (None: all).
    """
    rng = np.random.default_rng([7, number])
    lengths = rng.integers(max(targets + 2, int(0.8 * tokens)), int(1.2 * tokens) + 1, batch_size)
    ids = rng.integers(0, vocab_size, (batch_size, int(lengths.max())))
    in_completion = np.arange(ids.shape[1]) >= (lengths - targets)[:, None]
    ids[in_completion] %= target_ids or vocab_size
    ids[np.arange(ids.shape[1]) >= lengths[:, None]] = 0
    return Batch(ids, lengths, lengths - targets, np.arange(number * batch_size, (number + 1) * batch_size))


def model_folder(name: str) -> Path:
    """A local model folder; the builtin model is fetched at first use. Progress bars are off from here on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(resolve_model(name))
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--model {name}: not a local model folder (it needs config.json)")
    return folder


def recipe_config(layers: int, **sections: dict[str, Any]) -> RunConfig:
    """The settings of tc_ray/recipes/smollm2-svamp.yaml that cost time, for a model of `layers` layers.

    LoRA r16 from a third of the depth on; a Copilot of every fifth layer, trained in full.
    """
    values: dict[str, dict[str, Any]] = {
        "pilot": {"learning_rate": 6e-4, "lora": {"rank": 16, "alpha": 32, "first_layer": layers // 3}},
        "copilot": {"every": 5 if layers >= 10 else 2, "learning_rate": 1e-3, "steps_per_round": 3},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return RunConfig.model_validate(values)


def machine() -> str:
    """CPU model, cores, threads in use and versions, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch thread(s), "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count of measured seconds."""
    ordered = sorted(seconds)
    low, high = (float(np.quantile(ordered, q)) for q in (0.25, 0.75))
    return {"median": statistics.median(ordered), "q25": low, "q75": high, "count": float(len(ordered))}


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: first column to the left, the others to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    print(title)
    for row in cells:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  " + "  ".join(padded))


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result where `--json` asked for it."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {path}")
