"""A whole run on conversations: every answer is trained on, is in the log once, and the Copilot learns from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tc_ray.data.prepared.batches import RoundOrder
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.run.job import run_job
from tests.support.data_writers import lines
from tests.support.local_ray import local_ray
from tests.support.shape_cases import TOOLS_TEMPLATE
from tests.support.tiny_model import make_tiny_llama, make_tokenizer
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow
cluster = local_ray(cpus=4)
SAID = ["red", "green"]


def conversations(folder: Path) -> Path:
    rows = []
    for number in range(60):
        turns = [
            [{"from": "human", "value": f"{number}{'?' * turn}"}, {"from": "gpt", "value": said}]
            for turn, said in enumerate(SAID)
        ]
        rows.append({"conversations": [message for turn in turns for message in turn]})
    return lines(folder / "talks.jsonl", rows)


def test_a_run_on_conversations(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(tmp_path, data__train=str(conversations(tmp_path)), data__template="chat")
    run_job(config)
    train = pq.read_table(config.run.path / "data" / "train.parquet").to_pylist()
    assert len(train) == 36 and all(row["earlier_targets"] for row in train)
    order = RoundOrder(len(train), config.pilot.batch_size, config.pilot.epochs, config.run.seed)
    rounds = config.pilot.max_rounds or 0
    wanted = {
        (number, train[row]["sample_id"] + turn)
        for number in range(1, rounds + 1)
        for row in order.sample_rows(number)
        for turn in range(len(SAID))
    }
    records = MistakeLog(config.log_location).records()
    assert sorted(zip(records.round.tolist(), records.sample_id.tolist(), strict=True)) == sorted(wanted)
    assert not verify_log(config.log_location).twice
    for number in range(len(records)):
        ids = records.input_ids[records.seq_offsets[number] : records.seq_offsets[number + 1]]
        answer = SAID[int(records.sample_id[number]) % 2]
        assert tokenizer.decode(ids[records.target_start[number] :]) == f"{answer}<eos>"
    counts = np.diff(records.target_offsets)
    at, turn = np.repeat(records.round, counts), np.repeat(records.sample_id % 2, counts)
    for answer in (0, 1):
        first, last = (records.token_loss[(at == number) & (turn == answer)].mean() for number in (1, rounds))
        assert last < 0.95 * first, "ten rounds teach an answer of a conversation nothing"
    assert (config.run.path / "export" / "copilot" / "model.safetensors").exists()
