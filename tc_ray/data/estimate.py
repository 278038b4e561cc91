"""Rows and mean lengths of training data, from a sample of its files; for plans, without Ray."""

from __future__ import annotations

from dataclasses import dataclass

from tc_ray.config.schema import EMBEDDED, DataSection, ModelSection
from tc_ray.data.shapes import to_example
from tc_ray.data.sources import BadRow, find_files, iter_records
from tc_ray.data.tokenize import encode


@dataclass(frozen=True)
class DataEstimate:
    """rows: readable rows left for training after the cuts. Means are over `sampled` rows, in tokens."""

    rows: int
    mean_tokens: float
    mean_target_tokens: float
    sampled: int


def estimate(config: DataSection, model: ModelSection, *, sample_rows: int, seed: int) -> DataEstimate | None:
    """Estimate, or None where the files are absent or generated, or the tokenizer cannot be read here."""
    from transformers import AutoTokenizer

    from tc_ray.models.source import resolve_model

    files = [] if config.train == EMBEDDED else find_files(config.train)
    if not files:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model.pilot, model.cache))
    except (OSError, ValueError):  # a hub id without the hub
        return None
    rows, lengths, targets = 0, [], []
    for file in files:
        for record in iter_records(file):
            rows += 1
            if len(lengths) >= sample_rows or isinstance(record.value, BadRow):
                continue
            example = to_example(record.value, held_out=False)
            tokens = None if isinstance(example, BadRow) else encode(example, config, tokenizer)
            if tokens is not None:
                lengths.append(len(tokens.input_ids))
                targets.append(len(tokens.input_ids) - tokens.target_start)
    if not lengths:
        return None
    left = rows
    for size, own_file in ((config.validation_size, config.validation), (config.test_size, config.test)):
        if own_file is None:
            left -= int(size * rows) if size < 1 else int(size)
    if config.max_train_rows is not None:
        left = min(left, config.max_train_rows)
    return DataEstimate(max(0, left), sum(lengths) / len(lengths), sum(targets) / len(targets), len(lengths))
