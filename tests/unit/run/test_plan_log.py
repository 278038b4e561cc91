"""The plan's bytes of the log against a log that is really written, for what `log` can keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.batches import collate
from tc_ray.data.source.readers import iter_records
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.pilot.load import load_pilot
from tc_ray.pilot.engine import pilot_step
from tc_ray.pilot.record import chosen_records, log_metadata, to_records
from tc_ray.run.plan.plan import make_plan
from tc_ray.run.state import JobError
from tests.support import plan_samples
from tests.support.family_samples import folder_of
from tests.support.plan_samples import BATCH, ROWS
from tests.support.tiny_families import ENCODER_DECODER

MICRO = 4


def config_of(family: str, data: Path, folder: Path, **log: Any) -> RunConfig:
    positions = "target" if family in ENCODER_DECODER else "all"
    return plan_samples.config_of(
        folder_of(family), str(data), folder, copilot={"layers": [0, 2]}, log={"positions": positions} | log
    )


def written(config: RunConfig, data: Path, family: str) -> tuple[float, int]:
    """Bytes a round of a log of all rows, and its files."""
    encoder_decoder = family in ENCODER_DECODER
    model = load_pilot(folder_of(family), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(family))
    encoder = Encoder(config.data, tokenizer, 0, encoder_decoder)
    rows = [encoder.rows(record, held_out=False)[0] for record in iter_records(data)]
    step = pilot_step(model, config).eval()
    store = LogStore.create(config.log_location, log_metadata(config, model.config, tokenizer))
    ledger = Ledger(store.location, writers=1, run="plan")
    writer = RecordWriter(
        store.location,
        ledger.commit,
        LogSection(flush_rounds=config.log.flush_rounds, file_bytes=config.log.file_bytes, queue_rounds=4),
        run="plan",
        rank=0,
        attempt=ledger.begin_attempt(0, 1),
    )
    rounds = ROWS // BATCH
    for number in range(1, rounds + 1):
        for at in range((number - 1) * BATCH, number * BATCH, MICRO):
            batch = collate([{**rows[i], "sample_id": i} for i in range(at, at + MICRO)], 0)
            tensors = [torch.from_numpy(batch[n]) for n in ("input_ids", "lengths", "target_start")]
            record = step.measure(*tensors).record
            assert record is not None
            chosen = chosen_records(record, batch, config.log, seed=17, round=number)
            seen = np.zeros(MICRO, np.int16)
            records, _ = to_records(record, batch, seen, config.log, round=number, rank=0, attempt=1, chosen=chosen)
            writer.put(records, number)
        writer.end_round(number)
    writer.close()
    state = ledger.state()
    assert state.round == rounds
    return state.bytes / rounds, state.files


@pytest.mark.parametrize(
    ("family", "log"),
    [
        ("llama", {"flush_rounds": 4}),
        ("llama", {"flush_rounds": 1, "positions": "target"}),
        ("llama", {"top_k": 1000}),
        ("flan_t5", {}),
        ("llama", {"rationale": "all"}),
        ("llama", {"rationale": [0, 3], "positions": "target"}),
        ("flan_t5", {"rationale": "all"}),
        ("llama", {"states": "int8"}),
        ("flan_t5", {"states": "int8"}),
        ("llama", {"error": "dense"}),
        ("flan_t5", {"error": "dense"}),
        ("llama", {"sampling": "fraction", "sampling_fraction": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "pooled",
)
def test_predicted_log_bytes_are_what_is_written(data: Path, tmp_path: Path, family: str, log: dict[str, Any]) -> None:
    config = config_of(family, data, tmp_path / "run", **log)
    predicted = make_plan(config).log_bytes_per_round
    found, files = written(config, data, family)
    assert files == ROWS // BATCH // config.log.flush_rounds
    # which records a fraction of 96 takes is chance: 48, give or take 5
    assert predicted == pytest.approx(found, rel=0.25 if "sampling" in log else 0.1)


def test_what_cannot_be_known_is_said(data: Path, tmp_path: Path) -> None:
    fixed = make_plan(config_of("llama", data, tmp_path / "run"))
    mistakes = make_plan(config_of("llama", data, tmp_path / "run", sampling="mistakes", mistake_loss=2.5))
    assert "with every record" in str(mistakes) and "with every record" not in str(fixed)
    assert mistakes.log_bytes_per_round == fixed.log_bytes_per_round


def test_layers_that_the_pilot_does_not_have(data: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"log.rationale \[2, 4\] .* it has 4 decoder layers, 0 to 3"):
        make_plan(config_of("llama", data, tmp_path / "run", rationale=[2, 4]))
