"""Examples, records and Copilots that the tests against the reference share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tc_ray.config.log import LogSection
from tc_ray.data.prepared.batches import collate
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.copilot import Copilot
from tc_ray.models.pilot.step import PilotStep
from tc_ray.pilot.record import to_records
from tests.support.mistakelog_samples import metadata
from tests.support.reference import DenseRecord, dense_record

VOCAB = 258
WIDTH = 32
END = 1
# one target, many targets, one prompt token, the longest in the middle of the batch
SHAPES = [(9, 8), (12, 1), (17, 6), (5, 3)]


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Largest difference against largest entry."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max())
    worst = float((actual - expected).abs().max())
    assert worst <= relative * scale, f"off by {worst:.3g} at scale {scale:.3g}"


def dense_errors(ids: torch.Tensor, values: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Dense fp32 [N, V] from sparse [N, k+1]; unlisted tokens are zero (`rest` is not spread over them)."""
    dense = torch.zeros(ids.shape[0], vocab_size, device=ids.device)
    return dense.scatter_add_(1, ids, values.float())


def shaken(copilot: Copilot, seed: int = 5) -> Copilot:
    """Weights like those of a trained one: no identity, zero or tiny matrix that would hide a wrong order or shift."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in (copilot.error_projection, copilot.start, copilot.state_projection, copilot.memory_projection):
            if module is not None and hasattr(module, "weight"):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
        for norm in (copilot.question_norm, copilot.rationale_norm, copilot.stack.norm):
            norm.weight.mul_(1 + 0.3 * torch.randn_like(norm.weight))
        copilot.output.weight.normal_(std=0.3)
    return copilot.eval()


def make_copilot(kind: str, model_folder: Path, pilot: Any, tmp: Path) -> Copilot:
    """`same`: the Pilot's own layers; `few`: the same with f on some tokens only; `narrow`: a narrower decoder without the
    producing state."""
    if kind == "same":
        return shaken(Copilot.from_decoder(model_folder, [0, 1, 3], pilot=pilot))
    if kind == "few":
        tokens = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:120].sort().values
        return shaken(Copilot.from_decoder(model_folder, [2, 3], pilot=pilot, output_ids=tokens))
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(8)
    config = AutoConfig.from_pretrained(model_folder)
    config.hidden_size, config.head_dim, config.num_hidden_layers = 24, 6, 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp / "narrow")
    return shaken(Copilot.from_decoder(tmp / "narrow", [0, 1], pilot=pilot, producing_state="memory"))


def examples(seed: int = 3) -> list[dict[str, Any]]:
    """Rows as in train.parquet."""
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": rng.integers(2, VOCAB, length).tolist(), "target_start": start, "sample_id": 100 + number}
        for number, (length, start) in enumerate(SHAPES)
    ]


def logged(
    pilot: Any, folder: Path, *, top_k: int, positions: str = "all", train: bool = False
) -> tuple[Records, list[DenseRecord]]:
    """Records of one round by the real path, through Parquet and the Delta table, and the reference's."""
    rows = examples()
    batch = collate(rows, 0)
    step = PilotStep(pilot, top_k=top_k).train(train)
    loss, record = step(*(torch.from_numpy(batch[name]) for name in ("input_ids", "lengths", "target_start")), 1.0)
    assert record is not None
    expected = [dense_record(pilot, row["input_ids"], row["target_start"]) for row in rows]
    total = sum(float(e.token_loss.double().sum()) for e in expected)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    LogStore.create(folder, metadata(vocab_size=VOCAB, rationale_dim=WIDTH, top_k=min(top_k, VOCAB - 1)))
    ledger = Ledger(folder, writers=1, run="test")
    writer = RecordWriter(
        folder,
        ledger.commit,
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=2),
        run="test",
        rank=0,
        attempt=ledger.begin_attempt(0, 1),
    )
    settings = LogSection.model_validate({"positions": positions})
    records, _ = to_records(record, batch, np.zeros(len(rows)), settings, round=1, rank=0, attempt=1)
    writer.put(records, 1)
    writer.end_round(1)
    writer.close()
    return MistakeLog(folder).records(), expected


def states_of(records: Records, i: int) -> torch.Tensor:
    bits = records.rationale[records.rationale_offsets[i] : records.rationale_offsets[i + 1], 0]
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
